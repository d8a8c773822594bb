"""Adapters in other formats.

`peft` reads and writes PEFT's MiSS directories. `lora` writes LoRA directories, which are exact.
"""

from miss.interop import lora, peft

__all__ = ["lora", "peft"]
