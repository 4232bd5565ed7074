"""What is raised where something cannot be quantized."""


class QuantizationError(ValueError):
    """A model, or a part of it, that cannot be quantized; the message says where and why."""


__all__ = ["QuantizationError"]
