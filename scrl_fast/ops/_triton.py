"""Operators that launch Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def define_triton(name: str, fake: Callable[..., Any], launch: Callable[..., Any], written: Iterable[str] = ()) -> None:
    """Defines the operator ``scrl_fast::<name>``, which calls launch on CPU and CUDA tensors.

    Its schema is the signature of fake, its form without numbers. It also exists where the compiled library of schemas
    does not. written: the arguments that launch changes in place.
    """
    torch.library.define(f"scrl_fast::{name}", torch.library.infer_schema(fake, mutates_args=tuple(written)))
    torch.library.impl(f"scrl_fast::{name}", ("cpu", "cuda"), launch)
    torch.library.register_fake(f"scrl_fast::{name}", fake)
