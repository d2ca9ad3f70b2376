"""GPTQ and AWQ checkpoints made in the tests, packed by the formats' published formulas, word by word."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantised_matrix(
    weight: np.ndarray, group: int, *, symmetric: bool, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight [out, in], and each input's group → integers [out, in], zeros and float16 scales [groups, out]."""
    count = int(order.max()) + 1
    values = np.zeros(weight.shape, np.int64)
    zeros, scales = np.zeros((count, len(weight)), np.int64), np.zeros((count, len(weight)), np.float16)
    for index in range(count):
        some = order == index
        part = weight[:, some]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale, zero = 2 * np.maximum(-low, high) / 15, np.full(len(weight), 8)
        else:
            scale = (high - low) / 15
            zero = np.round(-low / scale)
        scales[index] = scale
        zeros[index] = zero
        wide = scales[index].astype(np.float32)[:, None]
        values[:, some] = np.clip(np.round(part / wide) + zero[:, None], 0, 15)
    return values, zeros, scales


def dequantised(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, order: np.ndarray) -> np.ndarray:
    """scale * (value - zero), [out, in] float32."""
    return ((values - zeros[order].T) * scales[order].T.astype(np.float32)).astype(np.float32)


def pack_rows(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """[rows, 8 * n] from 0 to 15 → [rows, n] int32: value number `order[i]` of each eight at bits 4 * i."""
    eights = values.reshape(len(values), -1, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:2], np.uint32)
    for place, value in enumerate(order):
        words |= eights[:, :, value] << np.uint32(4 * place)
    return words.view(np.int32)


def write_quantised(
    source: Path,
    target: Path,
    method: str,
    *,
    group: int = 32,
    symmetric: bool = False,
    desc_act: bool = False,
    **more: Any,
) -> Path:
    """The Hugging Face directory `source` with the linears of its layers quantised, in `target`; and beside it
    `dequantised.safetensors`, what they stand for."""
    shutil.copytree(source, target)
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    meant: dict[str, np.ndarray] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = meant[name] = weight
            continue
        base, size = name.removesuffix(".weight"), weight.shape[1]
        order = np.arange(size) // (size if group == -1 else group)
        if desc_act:
            order = rng.permutation(order)
        values, zeros, scales = quantised_matrix(weight, group, symmetric=symmetric, order=order)
        meant[name] = dequantised(values, zeros, scales, order)
        tensors[f"{base}.scales"] = scales
        if method == "gptq":
            less = 0 if more.get("checkpoint_format") == "gptq_v2" else 1
            tensors[f"{base}.qweight"] = pack_rows(values).T.copy()
            tensors[f"{base}.qzeros"] = pack_rows((zeros - less) & 15)
            tensors[f"{base}.g_idx"] = order.astype(np.int32)
        else:
            tensors[f"{base}.qweight"] = pack_rows(values.T, AWQ_ORDER)
            tensors[f"{base}.qzeros"] = pack_rows(zeros, AWQ_ORDER)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, target / "dequantised.file", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method, "bits": 4, "group_size": group, "desc_act": desc_act, "sym": symmetric, **more
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    return target
