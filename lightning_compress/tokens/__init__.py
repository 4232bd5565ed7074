"""Token pruning: find the stack of layers, decide by attention received, and go on with the tokens that stay."""
