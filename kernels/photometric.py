"""Colour in Triton, on whole levels kept in float32: the arithmetic of csrc/host/photometric.h, Pillow's own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whole(value):
    """Towards zero."""
    return value.to(tl.int32).to(tl.float32)


@triton.jit
def clamped(value, high):
    return tl.minimum(tl.maximum(value, 0.0), high)


@triton.jit
def nearest_level(value):
    return clamped(whole(value + 0.5), 255.0)


@triton.jit
def blended(base, value, factor):
    """Pillow's blend: extrapolates, clamps, truncates."""
    return clamped(whole(base + factor * (value - base)), 255.0)


@triton.jit
def luma(r, g, b):
    """ITU-R 601 in 16-bit fixed point, rounded; all sums stay below 2^24, where floats are exact."""
    return whole((r * 19595.0 + g * 38470.0 + b * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def turned(r, g, b, shift):
    """Through HSV in whole levels; `shift` is added to the hue level, which wraps at 256."""
    high = tl.maximum(tl.maximum(r, g), b)
    chroma = high - tl.minimum(tl.minimum(r, g), b)
    is_red = r == high
    is_green = g == high
    # sixths of the circle: from red (0), green (2) or blue (4), towards the larger of the other two
    towards = tl.where(is_red, g - b, tl.where(is_green, b - r, r - g))
    start = tl.where(is_red, 0.0, tl.where(is_green, 2.0, 4.0))
    sixths = start + tl.div_rn(towards, tl.maximum(chroma, 1.0))
    sixths = tl.where(sixths < 0, sixths + 6.0, sixths)
    hue = ((sixths * 42.5).to(tl.int32) + shift) & 255
    saturation = whole(tl.div_rn(chroma * 255.0, tl.maximum(high, 1.0))) * (1.0 / 255.0)
    angle = hue.to(tl.float32) * (6.0 / 255.0)
    # how far each channel falls from the highest level: all the way for two sixths, not at all for two
    fall_r = clamped(2.0 - tl.abs(angle - 3.0), 1.0)
    fall_g = clamped(tl.abs(angle - 2.0) - 1.0, 1.0)
    fall_b = clamped(tl.abs(angle - 4.0) - 1.0, 1.0)
    r = whole(high * (1.0 - saturation * fall_r) + 0.5)
    g = whole(high * (1.0 - saturation * fall_g) + 0.5)
    b = whole(high * (1.0 - saturation * fall_b) + 0.5)
    return r, g, b


@triton.jit
def coloured(r, g, b, kinds, amounts, begin, end, mean_grey):
    """Steps begin..end-1. kinds: three bits each: 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 to grey."""
    for step in range(begin, end):
        kind = (kinds >> (3 * step)) & 7
        amount = tl.load(amounts + step)
        if kind < 2:
            base = tl.where(kind == 0, 0.0, mean_grey)
            r = blended(base, r, amount)
            g = blended(base, g, amount)
            b = blended(base, b, amount)
        elif kind == 3:
            r, g, b = turned(r, g, b, (amount * 255.0).to(tl.int32))
        else:  # grey is no saturation at all
            grey = luma(r, g, b)
            r = blended(grey, r, amount)
            g = blended(grey, g, amount)
            b = blended(grey, b, amount)
    return r, g, b
