"""The same weights at other precisions: a GGUF file's matrices written again as another kind, by the format's own reference package.

    python benchmarks/variants.py MODEL.gguf Q4_0 OUT.gguf

The numbers that all variants share are those of MODEL.gguf, dequantised.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np


def write(source: Path, kind: str, out: Path) -> Path:
    """OUT with every matrix as `kind` (F32, BF16, Q8_0, Q4_0, Q4_1); a table that Q4 would spoil stays Q8_0, as published files have it."""
    if out.exists():
        return out
    reader = gguf.GGUFReader(str(source))
    arch = str(reader.fields["general.architecture"].contents())
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), arch)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        main, *rest = entry.types
        writer.add_key_value(name, entry.contents(), main, sub_type=rest[-1] if rest else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape([int(n) for n in tensor.shape[::-1]])
        chosen = "F32" if values.ndim == 1 else "Q8_0" if tensor.name == "token_embd.weight" and kind.startswith("Q4") else kind
        quant = gguf.GGMLQuantizationType[chosen]
        packed = values if chosen == "F32" else gguf.quantize(values, quant)
        writer.add_tensor(tensor.name, packed, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.replace(out)


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
