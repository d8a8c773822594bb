"""Adapters in the formats of others: `peft` reads and writes PEFT's MiSS directories, `lora` writes exact LoRA ones."""

from miss.interop import lora, peft

__all__ = ["lora", "peft"]
