"""The folded time x depth graph: nodes are the operations of one step, edges carry a delay."""

from __future__ import annotations

from .autograd_call import AutogradCall
from .decision import Decision, Verdict
from .dtypes import accumulation_dtype, mean_dtype, result_dtype
from .graph import (
    MODULE_KINDS,
    Chain,
    Edge,
    EdgeKind,
    Effects,
    Node,
    Ref,
    StepGraph,
    TensorType,
    has_registers,
    map_refs,
    refs_in,
    renamed_args,
    tensor_types,
)
from .huge_pages import on_huge_pages
from .kinds import Batching, OpKind, TimeCoupling
from .layout import KeepsStrides, chunk_like, chunk_strides, contiguous_chunk, extent, is_dense, lie_alike
from .printer import print_graph
from .unrolled import Cell, unroll
from .verifier import RULES, verify_graph

__all__ = [
    "MODULE_KINDS",
    "RULES",
    "AutogradCall",
    "Batching",
    "Cell",
    "Chain",
    "Decision",
    "Edge",
    "EdgeKind",
    "Effects",
    "KeepsStrides",
    "Node",
    "OpKind",
    "Ref",
    "StepGraph",
    "TensorType",
    "TimeCoupling",
    "Verdict",
    "accumulation_dtype",
    "chunk_like",
    "chunk_strides",
    "contiguous_chunk",
    "extent",
    "has_registers",
    "is_dense",
    "lie_alike",
    "map_refs",
    "mean_dtype",
    "on_huge_pages",
    "print_graph",
    "refs_in",
    "renamed_args",
    "result_dtype",
    "tensor_types",
    "unroll",
    "verify_graph",
]
