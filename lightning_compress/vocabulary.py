"""The vocabulary that a corpus uses: which ids to keep, and a tokenizer that gives only these.

    ids = used_ids(tokenizer, texts)
    plan = PruningPlan.of(model, structures, {vocabulary.name: ids})     structures of kind "vocab"
    smaller = trim_tokenizer(tokenizer, ids)                             smaller(text) = new_id[tokenizer(text)]

Ids that stay are numbered anew in their old order, by the plan and by the tokenizer alike.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

from lightning_compress.progress import Progress, quiet

BATCH = 1000


def used_ids(
    tokenizer: Any, texts: Iterable[str], *, characters: bool = True, progress: Progress = quiet
) -> tuple[int, ...]:
    """Ids that a corpus needs, increasing.

    These are the ids of its tokens, of all added (special) tokens and the unknown token, and, for byte-pair encoding,
    of every token that a merge on the way to one of them makes: with them the corpus is tokenized exactly as before.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``, or a fast tokenizer of transformers.
        texts: the corpus, read once in batches.
        characters: also keep every token of a single character (or byte), so that other texts can still be spelt.
        progress: wraps the texts, for a progress bar, see ``progress_bars``.

    Raises:
        TypeError: for a tokenizer of another kind.
        ValueError: for a kind of model that is not known.
    """
    backend = _backend(tokenizer)
    state = json.loads(backend.to_str())
    vocabulary = _vocabulary(state["model"])
    ids = {token["id"] for token in state["added_tokens"]}
    remaining = iter(progress(texts, "texts tokenized"))
    while batch := list(islice(remaining, BATCH)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=True):
            ids.update(encoding.ids)
    model = state["model"]
    unknown = model.get("unk_token")
    if unknown is not None and unknown in vocabulary:
        ids.add(vocabulary[unknown])
    if model.get("unk_id") is not None:
        ids.add(model["unk_id"])
    if characters:
        prefix = model.get("continuing_subword_prefix") or ""
        ids.update(number for token, number in vocabulary.items() if _is_character(token, prefix))
    if model["type"] == "BPE":
        ids |= _merged_from(model, vocabulary, ids)
    return tuple(sorted(ids))


def trim_tokenizer(tokenizer: Any, ids: Sequence[int]) -> Any:
    """A copy of ``tokenizer`` with only the tokens ``ids``, numbered anew in their old order.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``, or a fast tokenizer of transformers; it is left as it was.
        ids: ids to keep, as ``used_ids`` returns them; ids without a token (rows that pad a table) are passed over in
            the tokenizer, but they count in the numbering.

    Returns:
        A tokenizer of the same kind.

    Raises:
        TypeError: for a tokenizer of another kind.
        ValueError: if the ids are not increasing, or lack one that the tokenizer cannot do without (an added token, the
            unknown token).
    """
    if any(b <= a for a, b in pairwise(ids)):
        raise ValueError(f"Expected strictly increasing ids, but got {list(ids)[:8]}... Sort them: sorted(set(ids)).")
    from tokenizers import Tokenizer  # an extra; whoever has a tokenizer has it

    backend = _backend(tokenizer)
    number = {old: new for new, old in enumerate(ids)}
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        if token["id"] not in number:
            raise ValueError(
                f"Expected the ids to hold {token['id']}, the added token {token['content']!r}, but they do not. Start "
                "from used_ids(tokenizer, texts)."
            )
        token["id"] = number[token["id"]]
    _trim_model(state["model"], number)
    state["post_processor"] = _renumbered(state["post_processor"], number)
    if state.get("padding"):
        state["padding"]["pad_id"] = number.get(state["padding"]["pad_id"], 0)
    smaller = Tokenizer.from_str(json.dumps(state))
    if backend is tokenizer:
        return smaller
    result = copy.deepcopy(tokenizer)
    result._tokenizer = smaller
    return result


def _backend(tokenizer: Any) -> Any:
    """The ``tokenizers.Tokenizer`` that does the work."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if type(backend).__module__.partition(".")[0] != "tokenizers" or not hasattr(backend, "to_str"):
        raise TypeError(
            "Expected a tokenizers.Tokenizer or a fast tokenizer of transformers, but got "
            f"{type(tokenizer).__name__}. A slow tokenizer of transformers can be loaded as a fast one: "
            "AutoTokenizer.from_pretrained(name)."
        )
    return backend


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id."""
    if model["type"] in ("WordPiece", "BPE", "WordLevel"):
        return dict(model["vocab"])
    if model["type"] == "Unigram":
        return {token: number for number, (token, _) in enumerate(model["vocab"])}
    raise ValueError(
        f"Expected a tokenizer with a WordPiece, BPE, WordLevel or Unigram model, but got {model['type']}: its tokens "
        "cannot be numbered anew."
    )


def _is_character(token: str, prefix: str) -> bool:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return len(token.removeprefix(prefix)) == 1 or is_byte


def _pair(merge: Any) -> tuple[str, str]:
    """The two parts of a merge; older files write them as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _product(merge: Any, prefix: str) -> str:
    left, right = _pair(merge)
    return left + right.removeprefix(prefix)


def _merged_from(model: Mapping[str, Any], vocabulary: Mapping[str, int], ids: set[int]) -> set[int]:
    """Ids of all tokens that merges on the way to ``ids`` start from."""
    prefix = model.get("continuing_subword_prefix") or ""
    parts: dict[int, set[int]] = {}
    for merge in model["merges"]:
        product = vocabulary.get(_product(merge, prefix))
        if product is not None:
            parts.setdefault(product, set()).update(vocabulary[part] for part in _pair(merge) if part in vocabulary)
    found: set[int] = set()
    queue = list(ids)
    while queue:
        for part in parts.get(queue.pop(), ()):
            if part not in found:
                found.add(part)
                queue.append(part)
    return found


def _trim_model(model: dict[str, Any], number: Mapping[int, int]) -> None:
    vocabulary = _vocabulary(model)
    unknown = model.get("unk_token")
    lost = unknown is not None and unknown in vocabulary and vocabulary[unknown] not in number
    if lost or (model.get("unk_id") is not None and model["unk_id"] not in number):
        raise ValueError(
            "Expected the ids to hold that of the unknown token, but they do not. Start from used_ids(tokenizer, "
            "texts)."
        )
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in number]
        if [number[old] for old in vocabulary.values() if old in number] != list(range(len(model["vocab"]))):
            raise ValueError(
                "Expected the ids of a Unigram tokenizer to begin with those of its model, but added tokens lie "
                "between them: such a tokenizer cannot be numbered anew."
            )
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
        return
    model["vocab"] = {token: number[old] for token, old in vocabulary.items() if old in number}
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(token in model["vocab"] for token in (*_pair(merge), _product(merge, prefix)))
        ]


def _renumbered(processor: Any, number: Mapping[int, int]) -> Any:
    """A post-processor with new ids: templates name them in ``ids``, others in [token, id]."""
    if isinstance(processor, list):
        return [_renumbered(item, number) for item in processor]
    if not isinstance(processor, dict):
        return processor
    result = {key: _renumbered(value, number) for key, value in processor.items()}
    if isinstance(result.get("ids"), list):
        result["ids"] = [number[old] for old in result["ids"]]
    for key in ("sep", "cls"):
        if isinstance(result.get(key), list) and len(result[key]) == 2:
            result[key] = [result[key][0], number[result[key][1]]]
    return result


__all__ = ["trim_tokenizer", "used_ids"]
