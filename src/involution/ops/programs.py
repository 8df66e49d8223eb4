"""The Triton programs: involution as banded matrix products on the tensor cores.

Along a row, eight neighbouring outputs read sixteen neighbouring inputs, at most. So for every row of taps

    out (D, 8) += x (D, 16) @ band (16, 8),    band[i, j] = the kernel of output j at the tap that reads input i, or 0,

which is one instruction of a tensor core for sixteen channels: 16 / K times the multiply-adds, at a rate many times
higher, and x is read twice instead of K times. The gradient of x has the same form, with the kernels of the sixteen;
the gradient of the kernel is the band of the product x^T (16, D) @ grad (D, 8).

Two families. In `slide` and `products` a program serves a block of rows and groups, for any window. In `slide_tile`
and `products_tile` a program is one warp that serves one group in a tile of up to eight by eight outputs, and holds the
up to sixteen rows of x it needs in registers, for windows that fit.

Names: x and out (B, C, Z, Y, X), kernel (B, G, taps, Z, Y, X); `*_b`, `*_c` and so on are strides, I_* and O_* sizes
of what is read and of what is written, K_*, S_*, P_* and L_* kernel size, stride, padding and dilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(8)  # outputs of a strip; the least width of a tensor core's product
WINDOW = tl.constexpr(16)  # inputs of a strip; the depth of a tensor core's product

_SIZES = ["I_Z", "I_Y", "I_X", "O_Z", "O_Y", "O_X", "P_Z", "P_Y", "P_X"]
_COUNTS = ["groups", "row_blocks", "strip_blocks"]
_KERNEL = ["k_b", "k_g", "k_z", "k_y", "k_x"]
# Programs are compiled anew for strides of one or divisible by 16, as loads of several elements need to know them; but
# not for sizes.
_RUN_TIME = [*_SIZES, *_COUNTS, *_KERNEL]


@triton.jit
def _slices(t, N: tl.constexpr):
    """The N slices of t (N, P, Q), a power of two, as a tuple."""
    if N == 1:
        return (t.reshape(t.shape[1], t.shape[2]),)
    else:
        front, back = tl.split(t.reshape(2, N // 2, t.shape[1], t.shape[2]).permute(1, 2, 3, 0))
        return _slices(front, N // 2) + _slices(back, N // 2)


@triton.jit
def _place(groups, row_blocks, strip_blocks, O_Z, ROWS: tl.constexpr, STRIPS: tl.constexpr, GROUPS: tl.constexpr):
    """Which block this program serves: batch entry, z, first row, first strip, first group; groups run fastest."""
    index = tl.program_id(0)
    group_blocks = tl.cdiv(groups, GROUPS)
    group = index % group_blocks * GROUPS
    index = index // group_blocks
    strip = index % strip_blocks * STRIPS
    index = index // strip_blocks
    row = index % row_blocks * ROWS
    index = index // row_blocks
    return (index // O_Z).to(tl.int64), index % O_Z, row, strip, group


@triton.jit
def _read(place, tap, STRIDE: tl.constexpr, padding, DILATION: tl.constexpr, size, TRANSPOSED: tl.constexpr):
    """The position that `tap` reads for the output at `place`, and whether there is one."""
    if TRANSPOSED:
        steps = place + padding - tap * DILATION
        read = steps // STRIDE
        return read, (steps >= 0) & (steps % STRIDE == 0) & (read < size)
    else:
        read = place * STRIDE - padding + tap * DILATION
        return read, (read >= 0) & (read < size)


@triton.jit(do_not_specialize=_RUN_TIME)
def slide(
    x, kernel, out, x_b, x_c, x_z, x_y, x_x, k_b, k_g, k_t, k_z, k_y, k_x, out_b, out_c, out_z, out_y, out_x,
    I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Z: tl.constexpr, K_Y: tl.constexpr, K_X: tl.constexpr, S_Z: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr,
    L_Z: tl.constexpr, L_Y: tl.constexpr, L_X: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, CHUNKS: tl.constexpr, TRANSPOSED: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[o] = sum over taps t of kernel[o, t] * x[what t reads for o]; TRANSPOSED: out is the gradient of x.

    Then x is the gradient of the output, and kernel that of the position read: out[o] = sum of kernel[p, t] * x[p] over
    all p and t for which t reads o for p. A program serves ROWS x STRIPS strips, GROUPS groups and DEPTH of their
    CHANNELS; the window of a strip is passed in CHUNKS.
    """
    blocks: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    batch, z, row, strip, first = _place(groups * blocks, row_blocks, strip_blocks, O_Z, ROWS, STRIPS, GROUPS)
    first_channel = first % blocks * DEPTH
    first = first // blocks
    unit = tl.arange(0, ROWS * STRIPS)
    i = tl.arange(0, WINDOW).to(INDEX)
    j = tl.arange(0, COLUMNS).to(INDEX)
    rows = row + (unit // STRIPS).to(INDEX)
    start = (strip + (unit % STRIPS).to(INDEX)) * COLUMNS
    columns = start[:, None] + j[None, :]
    inside = (rows < O_Y)[:, None] & (columns < O_X)
    lane = tl.arange(0, GROUPS * DEPTH).to(INDEX)
    if CHANNELS == DEPTH:
        channel = first * CHANNELS + lane
        has_channel = channel < groups * CHANNELS
    else:
        channel = (first + lane // DEPTH) * CHANNELS + first_channel + lane % DEPTH
        has_channel = (first + lane // DEPTH < groups) & (first_channel + lane % DEPTH < CHANNELS)
    group = first + tl.arange(0, GROUPS).to(INDEX)
    if TRANSPOSED:
        least = start + P_X - (K_X - 1) * L_X
        window = tl.where(least > 0, (least + S_X - 1) // S_X, -(-least // S_X))[:, None] + i[None, :]
    else:
        window = start[:, None] * S_X - P_X + i[None, :]
    x += batch * x_b
    kernel += batch * k_b
    total = tl.zeros(
        (ROWS * STRIPS * GROUPS, DEPTH, COLUMNS), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    )
    for t_z in range(K_Z):
        read_z, has_z = _read(z, t_z, S_Z, P_Z, L_Z, I_Z, TRANSPOSED)
        for t_y in range(K_Y):
            read_y, has_y = _read(rows, t_y, S_Y, P_Y, L_Y, I_Y, TRANSPOSED)
            for chunk in range(CHUNKS):
                read = window + chunk * WINDOW
                has = (read >= 0) & (read < I_X) & (has_y & has_z)[:, None]
                at = read_z.to(INDEX) * x_z + read_y[:, None] * x_y + read * x_x
                values = tl.load(
                    x + at[:, :, None] + channel[None, None, :] * x_c, has[:, :, None] & has_channel[None, None, :], 0.0
                )
                values = values.reshape(ROWS * STRIPS, WINDOW, GROUPS, DEPTH).permute(0, 2, 3, 1)
                if TRANSPOSED:
                    steps = columns[:, None, :] + P_X - read[:, :, None] * S_X
                    at = read_z.to(INDEX) * k_z + read_y[:, None, None] * k_y + read[:, :, None] * k_x
                    ok = has[:, :, None] & inside[:, None, :]
                else:
                    steps = (i[:, None] + chunk * WINDOW - j[None, :] * S_X)[None, :, :]
                    at = z.to(INDEX) * k_z + rows[:, None, None] * k_y + columns[:, None, :] * k_x
                    ok = inside[:, None, :]
                ok = ok & (steps >= 0) & (steps % L_X == 0) & (steps // L_X < K_X)
                at = at + ((t_z * K_Y + t_y) * K_X + steps // L_X) * k_t
                band = tl.load(
                    kernel + at[:, None, :, :] + (group * k_g)[None, :, None, None],
                    ok[:, None, :, :] & (group < groups)[None, :, None, None],
                    0.0,
                )
                total = tl.dot(
                    values.reshape(ROWS * STRIPS * GROUPS, DEPTH, WINDOW),
                    band.reshape(ROWS * STRIPS * GROUPS, WINDOW, COLUMNS),
                    total,
                    input_precision=PRECISION,
                    out_dtype=total.dtype,
                )
    result = total.reshape(ROWS * STRIPS, GROUPS, DEPTH, COLUMNS).permute(0, 3, 1, 2)
    result = result.reshape(ROWS * STRIPS, COLUMNS, GROUPS * DEPTH).to(out.dtype.element_ty)
    at = z.to(INDEX) * out_z + rows[:, None] * out_y + columns * out_x
    out += batch * out_b
    tl.store(
        out + at[:, :, None] + channel[None, None, :] * out_c, result, inside[:, :, None] & has_channel[None, None, :]
    )


@triton.jit(do_not_specialize=_RUN_TIME)
def products(
    x, kernel, grad, x_b, x_c, x_z, x_y, x_x, k_b, k_g, k_t, k_z, k_y, k_x, grad_b, grad_c, grad_z, grad_y, grad_x,
    I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Z: tl.constexpr, K_Y: tl.constexpr, K_X: tl.constexpr, S_Z: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr,
    L_Z: tl.constexpr, L_Y: tl.constexpr, L_X: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, CHUNKS: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """kernel[o, t] = sum over the channels of a group of grad[o] * x[what t reads for o], the gradient of the kernel.

    A program serves ROWS x STRIPS strips and GROUPS groups, whose CHANNELS it sums DEPTH at a time; the window of a
    strip is passed in CHUNKS.
    """
    batch, z, row, strip, first = _place(groups, row_blocks, strip_blocks, O_Z, ROWS, STRIPS, GROUPS)
    units: tl.constexpr = ROWS * STRIPS
    unit = tl.arange(0, units)
    i = tl.arange(0, WINDOW).to(INDEX)
    j = tl.arange(0, COLUMNS).to(INDEX)
    rows = row + (unit // STRIPS).to(INDEX)
    start = (strip + (unit % STRIPS).to(INDEX)) * COLUMNS
    columns = start[:, None] + j[None, :]
    inside = (rows < O_Y)[:, None] & (columns < O_X)
    lane = tl.arange(0, GROUPS * DEPTH).to(INDEX)
    group = first + tl.arange(0, GROUPS).to(INDEX)
    x += batch * x_b
    grad += batch * grad_b
    kernel += batch * k_b
    grad_at = z.to(INDEX) * grad_z + rows[:, None] * grad_y + columns * grad_x
    kernel_at = z.to(INDEX) * k_z + rows[:, None, None] * k_y + columns[:, None, :] * k_x
    for t_z in range(K_Z):
        read_z, has_z = _read(z, t_z, S_Z, P_Z, L_Z, I_Z, False)
        for t_y in range(K_Y):
            read_y, has_y = _read(rows, t_y, S_Y, P_Y, L_Y, I_Y, False)
            for chunk in range(CHUNKS):
                read = start[:, None] * S_X - P_X + chunk * WINDOW + i[None, :]
                has = (read >= 0) & (read < I_X) & (has_y & has_z)[:, None]
                at = read_z.to(INDEX) * x_z + read_y[:, None] * x_y + read * x_x
                total = tl.zeros(
                    (units * GROUPS, WINDOW, COLUMNS), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
                )
                for depth in range(0, CHANNELS, DEPTH):
                    if CHANNELS == DEPTH:
                        channel = first * CHANNELS + lane
                        has_channel = channel < groups * CHANNELS
                    else:
                        channel = (first + lane // DEPTH) * CHANNELS + depth + lane % DEPTH
                        has_channel = (first + lane // DEPTH < groups) & (depth + lane % DEPTH < CHANNELS)
                    values = tl.load(
                        x + at[:, :, None] + channel[None, None, :] * x_c,
                        has[:, :, None] & has_channel[None, None, :],
                        0.0,
                    )
                    grads = tl.load(
                        grad + grad_at[:, :, None] + channel[None, None, :] * grad_c,
                        inside[:, :, None] & has_channel[None, None, :],
                        0.0,
                    )
                    values = values.reshape(units, WINDOW, GROUPS, DEPTH).permute(0, 2, 1, 3)
                    grads = grads.reshape(units, COLUMNS, GROUPS, DEPTH).permute(0, 2, 3, 1)
                    total = tl.dot(
                        values.reshape(units * GROUPS, WINDOW, DEPTH),
                        grads.reshape(units * GROUPS, DEPTH, COLUMNS),
                        total,
                        input_precision=PRECISION,
                        out_dtype=total.dtype,
                    )
                steps = (i[:, None] + chunk * WINDOW - j[None, :] * S_X)[None, :, :]
                ok = inside[:, None, :] & (steps >= 0) & (steps % L_X == 0) & (steps // L_X < K_X)
                tap = (t_z * K_Y + t_y) * K_X + steps // L_X
                tl.store(
                    kernel + (kernel_at + tap * k_t)[:, None, :, :] + (group * k_g)[None, :, None, None],
                    total.reshape(units, GROUPS, WINDOW, COLUMNS).to(kernel.dtype.element_ty),
                    ok[:, None, :, :] & (group < groups)[None, :, None, None],
                )


@triton.jit
def _rows_of(
    x, x_y, x_x, x_c, row, column, STEP: tl.constexpr, I_Y, I_X, NEEDED: tl.constexpr, CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Sixteen rows of x (16 columns STEP apart, 16 channels) from a row and column on; zero outside and after NEEDED.

    One load for all of them: loads of one row each would wait for one another.
    """
    k = tl.arange(0, WINDOW).to(INDEX)
    rows = row + k
    columns = column + k * STEP
    has_row = (rows >= 0) & (rows < I_Y) & (k < NEEDED)
    has_column = (columns >= 0) & (columns < I_X)
    at = rows[:, None, None] * x_y + columns[None, :, None] * x_x + k[None, None, :] * x_c
    ok = has_row[:, None, None] & has_column[None, :, None] & (k < CHANNELS)[None, None, :]
    return _slices(tl.load(x + at, ok, 0.0), WINDOW)


@triton.jit
def _band(
    at,
    ok,
    n: tl.constexpr,
    row,
    k_y,
    k_t,
    size,
    K_Y: tl.constexpr,
    K_X: tl.constexpr,
    L_Y: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The n-th band of a tile: that of output row n // K_Y and of row n % K_Y of taps."""
    if TRANSPOSED:
        source = row + n // K_Y + (K_Y - 1 - n % K_Y) * L_Y
    else:
        source = row + n // K_Y
    return tl.load(at + source * k_y + n % K_Y * K_X * k_t, ok & (source >= 0) & (source < size), 0.0)


@triton.jit(do_not_specialize=_RUN_TIME)
def slide_tile(
    x, kernel, out, x_b, x_c, x_z, x_y, x_x, k_b, k_g, k_t, k_z, k_y, k_x, out_b, out_c, out_z, out_y, out_x,
    I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Y: tl.constexpr, K_X: tl.constexpr, L_Y: tl.constexpr, L_X: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, AHEAD: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`slide` of stride 1 for one group of up to 16 channels and ROWS strips, one below the other; two axes.

    Bands are loaded AHEAD of their use: with few warps on a multiprocessor nothing else hides the memory's latency.
    """
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, ROWS, 1, 1)
    i = tl.arange(0, WINDOW).to(INDEX)
    j = tl.arange(0, COLUMNS).to(INDEX)
    row = row.to(INDEX)
    columns = strip.to(INDEX) * COLUMNS + j
    if TRANSPOSED:
        first_row = row + P_Y - (K_Y - 1) * L_Y
        window = strip.to(INDEX) * COLUMNS + P_X - (K_X - 1) * L_X
        steps = (K_X - 1) * L_X + j[None, :] - i[:, None]
    else:
        first_row = row - P_Y
        window = strip.to(INDEX) * COLUMNS - P_X
        steps = i[:, None] - j[None, :]
    ok = (columns < O_X)[None, :] & (steps >= 0) & (steps % L_X == 0) & (steps // L_X < K_X)
    kernel += batch * k_b + group.to(INDEX) * k_g
    if TRANSPOSED:
        sources = window + i
        ok = ok & ((sources >= 0) & (sources < I_X))[:, None]
        at = kernel + sources[:, None] * k_x + steps // L_X * k_t
        kernel_row, kernel_rows = first_row, I_Y
    else:
        at = kernel + columns[None, :] * k_x + steps // L_X * k_t
        kernel_row, kernel_rows = row, O_Y
    x += batch * x_b + group.to(INDEX) * CHANNELS * x_c
    needed: tl.constexpr = ROWS + (K_Y - 1) * L_Y
    rows = _rows_of(x, x_y, x_x, x_c, first_row, window, 1, I_Y, I_X, needed, CHANNELS, INDEX)
    out += batch * out_b + group.to(INDEX) * CHANNELS * out_c
    out_at = out + columns[:, None] * out_x + i[None, :] * out_c
    out_ok = (columns < O_X)[:, None] & (i < CHANNELS)[None, :]
    bands = ()
    for n in tl.static_range(AHEAD):
        bands = bands + (_band(at, ok, n, kernel_row, k_y, k_t, kernel_rows, K_Y, K_X, L_Y, TRANSPOSED),)
    total = tl.zeros((WINDOW, COLUMNS), tl.float32)
    for n in tl.static_range(ROWS * K_Y):
        if n + AHEAD < ROWS * K_Y:
            bands = bands + (_band(at, ok, n + AHEAD, kernel_row, k_y, k_t, kernel_rows, K_Y, K_X, L_Y, TRANSPOSED),)
        if TRANSPOSED:
            values = rows[n // K_Y + (K_Y - 1 - n % K_Y) * L_Y]
        else:
            values = rows[n // K_Y + n % K_Y * L_Y]
        total = tl.dot(values.T, bands[n], total, input_precision=PRECISION)
        if n % K_Y == K_Y - 1:
            # Transposed: in the shape of a band its layout would become that of the bands' loads.
            result = total.T.to(out.dtype.element_ty)
            tl.store(out_at + (row + n // K_Y) * out_y, result, out_ok & (row + n // K_Y < O_Y))
            total = tl.zeros((WINDOW, COLUMNS), tl.float32)


@triton.jit(do_not_specialize=_RUN_TIME)
def products_tile(
    x, kernel, grad, x_b, x_c, x_z, x_y, x_x, k_b, k_g, k_t, k_z, k_y, k_x, grad_b, grad_c, grad_z, grad_y, grad_x,
    I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Y: tl.constexpr, K_X: tl.constexpr, L_Y: tl.constexpr, L_X: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`products` of stride 1 for one group of up to 16 channels and ROWS strips, one below the other; two axes."""
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, ROWS, 1, 1)
    i = tl.arange(0, WINDOW).to(INDEX)
    j = tl.arange(0, COLUMNS).to(INDEX)
    y = tl.arange(0, COLUMNS).to(INDEX)
    row = row.to(INDEX)
    columns = strip.to(INDEX) * COLUMNS + j
    x += batch * x_b + group.to(INDEX) * CHANNELS * x_c
    needed: tl.constexpr = ROWS + (K_Y - 1) * L_Y
    window = strip.to(INDEX) * COLUMNS - P_X
    rows = _rows_of(x, x_y, x_x, x_c, row - P_Y, window, 1, I_Y, I_X, needed, CHANNELS, INDEX)
    grad += batch * grad_b + group.to(INDEX) * CHANNELS * grad_c
    grads = tl.load(
        grad + (row + y)[:, None, None] * grad_y + columns[None, :, None] * grad_x + i[None, None, :] * grad_c,
        ((row + y < O_Y) & (y < ROWS))[:, None, None] & (columns < O_X)[None, :, None] & (i < CHANNELS)[None, None, :],
        0.0,
    )
    grads = _slices(grads, COLUMNS)
    steps = i[:, None] - j[None, :]
    ok = (columns < O_X)[None, :] & (steps >= 0) & (steps % L_X == 0) & (steps // L_X < K_X)
    kernel += batch * k_b + group.to(INDEX) * k_g
    at = kernel + columns[None, :] * k_x + steps // L_X * k_t
    for n in tl.static_range(ROWS * K_Y):
        result = tl.dot(rows[n // K_Y + n % K_Y * L_Y], grads[n // K_Y].T, input_precision=PRECISION)
        here = at + (row + n // K_Y) * k_y + n % K_Y * K_X * k_t
        tl.store(here, result.to(kernel.dtype.element_ty), ok & (row + n // K_Y < O_Y))
