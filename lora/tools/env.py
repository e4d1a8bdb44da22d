"""What this machine has, for a bug report: versions, devices and what they support.

python -m lora env
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
import platform

import torch

from lora import __version__
from lora.common.errors import UserError
from lora.common.operating_system import physical_memory_bytes
from lora.config.flags import Parser
from lora.export.final_artifact import cpu_name
from lora.model.attention import FLASH_NEEDS, has_flash
from lora.model.device import cpu_has_bfloat16
from lora.quantization import import_bitsandbytes

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "numpy", "peft")


def main(argv: Sequence[str]) -> None:
    Parser("Print versions, devices and what they support, for a bug report.").parse_args(argv)
    for name, value in [*versions(), *devices(), *features()]:
        print(f"{name:16}{value}")


def versions() -> Iterator[tuple[str, str]]:
    yield "plainlora", __version__
    yield "Python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    yield "system", platform.platform()


def devices() -> Iterator[tuple[str, str]]:
    """Yield every device with its memory and the dtypes it computes in natively."""
    facts = [cpu_name(), f"{torch.get_num_threads()} threads", memory(physical_memory_bytes())]
    facts.append("float32, bfloat16" if cpu_has_bfloat16() else "float32")
    yield "cpu", ", ".join(facts)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        facts = [properties.name, capability, memory(properties.total_memory)]
        facts.append("float32, float16")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            facts.append("bfloat16")
        yield f"cuda:{index}", ", ".join(facts)
    if torch.backends.mps.is_available():
        yield "mps", "float32"


def memory(num_bytes: int | None) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes else "memory unknown"


def features() -> Iterator[tuple[str, str]]:
    """Yield whether FlashAttention and 4-bit bases can be used, and why not."""
    yield "FlashAttention", flash_attention()
    try:
        import_bitsandbytes("4 bits", torch.device("cpu"))
        yield "4 bits", "yes, on cpu and cuda" if torch.cuda.is_available() else "yes, on cpu"
    except UserError as error:
        yield "4 bits", f"no: {error}"


def flash_attention() -> str:
    if torch.cuda.is_available() and has_flash(torch.device("cuda")):
        return "yes, in bfloat16 and float16, for heads of a width of 8, 16, ... 256"
    return f"no: {FLASH_NEEDS}"
