"""The CPU backend: C++ where inputs are float32 on the CPU and need no gradient, else the reference."""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.batch import LoraFactors, LoraSegment, PagedRows
from kernels.bfloat16 import BFloat16Weight
from kernels.cpu.build import BuildError
from kernels.cpu.layers import CACHE_TYPES, CpuLayers
from kernels.cpu.library import address, load, load_wanted
from kernels.cpu.lora import LoraLayout, laid_out, segment_table, suits
from kernels.cpu.tiles import TILE, Int4Tiles, Int8GroupTiles, Int8Tiles, Nf4Tiles, Tiles, tiled
from kernels.cpu.variants import Variant
from kernels.quantised import Int8Weight, QuantisedWeight, Weight, quantise_rows
from kernels.reference import ReferenceOps
from kernels.stack import ContextT, ForwardLayers, LayerStack, LayerWeights


class CpuOps(ReferenceOps):
    """Training goes through the reference: these ops have no gradients."""

    name = "cpu"
    batch_invariant = True

    def __init__(self, variant: Variant | None = None) -> None:
        """Without a `variant` the fastest one. Raises `BuildError`, `OSError` or `ValueError` when it cannot be had."""
        self.variant, self._lib = (variant, load(variant)) if variant else load_wanted()

    @classmethod
    def unavailable(cls) -> str | None:
        if not sys.platform.startswith("linux"):
            return "works on Linux only"
        try:
            load_wanted()
        except (BuildError, OSError, ValueError) as error:
            return str(error)
        return None

    def prepare(self, weight: QuantisedWeight) -> QuantisedWeight:
        return tiled(weight, self.variant) if weight.device.type == "cpu" else weight

    def fuse_layers(self, stack: LayerStack, layer_by_layer: ForwardLayers[ContextT]) -> ForwardLayers[ContextT]:
        suited = all(_suits(layer) for layer in stack.layers)
        return CpuLayers(stack, self._lib, self.op_of, layer_by_layer) if suited else layer_by_layer

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not _fits(x, weight):
            return super().linear(x, weight, bias)
        return self._linear(x, weight, bias)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not _fits(x, weight):
            return super().norm_linear(x, norm, eps, weight, bias)
        return self._linear(x, weight, bias, norm=norm, eps=eps)

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not _fits(x, weight) or (isinstance(weight, Tiles) and weight.shape[0] % (2 * TILE)):
            return super().norm_swiglu(x, norm, eps, weight, bias)
        return self._linear(x, weight, bias, norm=norm, eps=eps, swiglu=True)

    def linear_add(self, residual: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if not _fits(x, weight):
            return super().linear_add(residual, x, weight, bias)
        return self._linear(x, weight, bias, residual=residual.contiguous())

    def _linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor:
        x = _rows(x)
        rows, size = x.shape
        out = weight.shape[0] // 2 if swiglu else weight.shape[0]
        y = torch.empty(rows, out)
        op, (values, scales, zero_sums) = self.op_of(weight)
        op(
            x.data_ptr(),
            x.stride(0),
            rows,
            size,
            out,
            values,
            scales,
            zero_sums,
            address(bias),
            address(norm),
            eps,
            address(residual),
            y.data_ptr(),
            swiglu,
            None,
            torch.get_num_threads(),
        )
        return y

    def op_of(self, weight: Weight) -> tuple[Callable[..., None], tuple[int, int, int]]:
        """The op for a weight that `_fits`, and the addresses of its values, scales and sums for a row of zeros."""
        lib = self._lib
        match weight:
            case Int8Tiles():
                op = lib.eft_linear_int8_narrow if weight.narrow else lib.eft_linear_int8
                return op, (weight.values.data_ptr(), weight.scales.data_ptr(), weight.zeros.data_ptr())
            case Int4Tiles():
                return lib.eft_linear_int4, (weight.values.data_ptr(), 0, 0)
            case Int8GroupTiles():
                return lib.eft_linear_int8_groups, (weight.values.data_ptr(), 0, 0)
            case Nf4Tiles():
                return lib.eft_linear_nf4, (weight.values.data_ptr(), weight.scales.data_ptr(), 0)
            case BFloat16Weight():
                return lib.eft_linear_bfloat16, (weight.values.data_ptr(), 0, 0)
        assert isinstance(weight, Tensor)
        return lib.eft_linear_float32, (weight.data_ptr(), 0, 0)

    def int8_sums(self, turned: Tensor, weight: Int8Weight, most: Tensor) -> Tensor:
        if not (_ours(turned) and weight.device.type == "cpu" and weight.values.stride(1) == 1):
            return super().int8_sums(turned, weight, most)
        values, _ = quantise_rows(turned, most)
        return self._products(values.to(torch.int8), weight)

    def _products(self, x: Tensor, weight: Int8Weight) -> Tensor:
        """x [R, in] int8 times the weight's integers transposed → [R, out] int32."""
        x = x.contiguous()
        y = torch.empty(len(x), len(weight.values), dtype=torch.int32)
        self._lib.eft_int8_matmul(
            x.data_ptr(),
            *x.shape,
            weight.values.data_ptr(),
            weight.values.stride(0),
            weight.sums.data_ptr(),
            len(weight.values),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def prepare_lora(self, factors: LoraFactors, dtype: torch.dtype = torch.float32) -> LoraFactors:
        return LoraLayout.of(factors, dtype) if suits(factors) else factors

    def lora_apply(self, x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        ours = laid_out(segments) if _ours(x, y) and y.stride(1) == 1 else None
        if ours is None:
            return super().lora_apply(x, y, segments)
        x = _rows(x)
        table = segment_table(len(x), ours)
        self._lib.eft_lora_apply(
            x.data_ptr(),
            x.stride(0),
            *x.shape,
            y.data_ptr(),
            y.stride(0),
            table,
            torch.get_num_threads(),
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x, weight, 0.0, eps) if _ours(x, weight) else super().rms_norm(x, weight, eps)

    def rms_norm_plus_one(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x, weight, 1.0, eps) if _ours(x, weight) else super().rms_norm_plus_one(x, weight, eps)

    def _rms_norm(self, x: Tensor, weight: Tensor, one: float, eps: float) -> Tensor:
        x = _rows(x)
        y = torch.empty(x.shape)
        self._lib.eft_rms_norm(
            x.data_ptr(), x.stride(0), *x.shape, weight.data_ptr(), one, eps, y.data_ptr(), torch.get_num_threads()
        )
        return y

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if x.ndim != 2 or not _ours(x, *(given for given in (weight, bias) if given is not None)):
            return super().layer_norm(x, weight, bias, eps)
        x = _rows(x)
        y = torch.empty(x.shape)
        self._lib.eft_layer_norm(
            x.data_ptr(),
            x.stride(0),
            *x.shape,
            address(weight),
            address(bias),
            eps,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if not _ours(gate_up):
            return super().silu_mul(gate_up)
        gate_up = gate_up.contiguous()
        rows, inner = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty(rows, inner)
        self._lib.eft_silu_mul(gate_up.data_ptr(), rows, inner, y.data_ptr(), torch.get_num_threads())
        return y

    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        if not _ours(gate_up):
            return super().gelu_mul(gate_up, tanh=tanh)
        gate_up = gate_up.contiguous()
        rows, inner = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty(rows, inner)
        self._lib.eft_gelu_mul(gate_up.data_ptr(), rows, inner, tanh, y.data_ptr(), torch.get_num_threads())
        return y

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        if not _ours(x):
            return super().gelu(x, tanh=tanh)
        x = x.contiguous()
        y = torch.empty(x.shape)
        self._lib.eft_gelu(x.data_ptr(), x.numel(), tanh, y.data_ptr(), torch.get_num_threads())
        return y

    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if not (_ours(q, k, v, cos) and _cached(k_cache)):
            return super().rope_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots)
        q, k, v, cos, sin = _heads(q), _heads(k), _heads(v), cos.contiguous(), sin.contiguous()
        self._lib.eft_rope_and_cache(
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[1],
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots.data_ptr(),
            len(q),
            q.shape[1],
            k.shape[1],
            q.shape[2],
            CACHE_TYPES[k_cache.dtype],
            torch.get_num_threads(),
        )
        return q, k

    def paged_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: PagedRows,
        scale: float,
        *,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        if not (_ours(q) and _cached(k_cache)):
            return super().paged_attention(q, k, v, k_cache, v_cache, rows, scale, window=window, softcap=softcap)
        q = _heads(q)
        out = torch.empty(q.shape)
        self._lib.eft_paged_attention(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            rows.tables.data_ptr(),
            rows.tables.shape[1],
            rows.extents.data_ptr(),
            len(rows.counts),
            q.shape[1],
            k_cache.shape[2],
            q.shape[2],
            rows.block_size,
            scale,
            window or 0,
            softcap,
            out.data_ptr(),
            CACHE_TYPES[k_cache.dtype],
            torch.get_num_threads(),
        )
        return out

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not _ours(logits):
            return super().argmax(logits)
        logits = logits.contiguous()
        index, best = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
        self._lib.eft_argmax(
            logits.data_ptr(), *logits.shape, index.data_ptr(), best.data_ptr(), torch.get_num_threads()
        )
        return best, index

    def sample(
        self, logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
    ) -> Tensor:
        if not _ours(logits, temperature, top_p, min_p):
            return super().sample(logits, uniform, temperature, top_k, top_p, min_p)
        logits = _rows(logits)
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._lib.eft_sample(
            logits.data_ptr(),
            logits.stride(0),
            *logits.shape,
            uniform.data_ptr(),
            temperature.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            tokens.data_ptr(),
            torch.get_num_threads(),
        )
        return tokens


def _fits(x: Tensor, weight: Weight) -> bool:
    """True if there is a C++ linear for these."""
    if isinstance(weight, QuantisedWeight):
        return isinstance(weight, Tiles | BFloat16Weight) and _ours(x)
    return weight.is_contiguous() and _ours(x, weight)


def _suits(layer: LayerWeights) -> bool:
    """True if all of a layer can be computed in C++."""
    norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    vectors = [x for x in (*norms, *(linear.bias for linear in layer.linears)) if x is not None]
    return all(_fits(vectors[0], linear.weight) for linear in layer.linears) and all(
        _ours(x) and x.is_contiguous() for x in vectors
    )


def _cached(cache: Tensor) -> bool:
    return cache.dtype in CACHE_TYPES and cache.device.type == "cpu"


def _ours(*tensors: Tensor) -> bool:
    """True if the C++ ops can take these: float32 on the CPU, without a gradient."""
    wants_grad = torch.is_grad_enabled()
    for x in tensors:
        if x.dtype is not torch.float32 or x.device.type != "cpu" or (wants_grad and x.requires_grad):
            return False
    return True


def _rows(x: Tensor) -> Tensor:
    """x [T, size] with each row in one piece."""
    return x if x.stride(1) == 1 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with each token in one piece."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
