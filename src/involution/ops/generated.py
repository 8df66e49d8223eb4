"""The Triton programs that keep a generated kernel on the chip; names as in `programs.py`.

A product on the tensor cores gives kernels; what turns them into the bands of another is that a register holds two
neighbours. If these are taps of one output, or the same tap counted from one input for two outputs, then a band is what
some lane already holds, and one exchange between lanes makes it. To have neighbours begin at an even place, kernels are
generated twice, the second time one slot later, and every output takes the one that suits its column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from involution.ops.programs import _COUNTS, _SIZES, COLUMNS, WINDOW, _place, _rows_of, _slices

_AHEAD = tl.constexpr(2)  # rows that are loaded before their turn


@triton.jit
def _pairs(low, high, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Two float32 as one number, rounded to a type of two bytes each; PACKED: by the instruction that does just this."""
    if PACKED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], tl.uint32, True, 1)
    elif PACKED:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,r,r", [high, low], tl.uint32, True, 1)
    else:
        low = low.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def _halves(pairs, dtype: tl.constexpr):
    """The low and the high numbers of `pairs`."""
    low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    return low, (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _band(near, far, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Bands (P, 16) from pairs (P, 4) that belong to the first eight of their inputs, and to the other eight."""
    low, high = _halves(tl.join(near, far).permute(0, 2, 1).reshape(near.shape[0], 8), dtype)
    band = tl.join(low, high).reshape(near.shape[0], WINDOW)
    if PACKED:
        # Does nothing, but Triton does not look through it. Where it sees values joined it takes them for smaller ones,
        # and would exchange by way of shared memory what each lane holds already.
        band = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [band], band.dtype, False, 2)
    return band


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS])
def generated_tile(
    x, features, weight, bias, out, x_b, x_c, x_z, x_y, x_x, f_b, f_c, f_z, f_y, f_x, w_o, w_r,
    out_b, out_c, out_z, out_y, out_x, I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Y: tl.constexpr, K_X: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr, REDUCED: tl.constexpr,
    REDUCED_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, INDEX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`slide_tile` with bands generated on the chip: kernel = weight @ features + bias.

    For a row of taps, or every S_X-th of one, the product of the tile's features and of these rows of the weight is the
    kernel of each output, in eight slots. For the output of column n it begins at slot n % 2, so that two products, with
    weights shifted by one, serve all outputs, and pairs of slots turned around by n // 2 pairs are the column of the
    band.
    """
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, ROWS, 1, 1)
    row = row.to(INDEX)
    column = strip.to(INDEX) * COLUMNS
    x += batch * x_b + group.to(INDEX) * CHANNELS * x_c
    needed: tl.constexpr = (ROWS - 1) * S_Y + K_Y
    tile: tl.constexpr = _rows_held(ROWS) * COLUMNS
    place = tl.arange(0, tile)
    place_row = row + (place // COLUMNS).to(INDEX)
    place_column = column + (place % COLUMNS).to(INDEX)
    r = tl.arange(0, REDUCED_BLOCK).to(INDEX)
    made = tl.load(
        features + batch * f_b + (place_row * f_y + place_column * f_x)[:, None] + r[None, :] * f_c,
        ((place_row < O_Y) & (place_column < O_X))[:, None] & (r < REDUCED)[None, :],
        0.0,
    )
    slot = tl.arange(0, COLUMNS)
    pair = tl.arange(0, COLUMNS // 2)
    turn = (place % COLUMNS // 2)[:, None]
    source = (pair[None, :] - turn) & (COLUMNS // 2 - 1)
    near = pair[None, :] >= turn  # whose pair belongs to the first eight inputs, else to the other eight
    odd = (place % 2 == 1)[:, None]
    totals = ()
    for y in tl.static_range(ROWS):
        totals = totals + (tl.zeros((WINDOW, COLUMNS), tl.float32),)
    for phase in range(S_X):
        start = column * S_X - P_X + phase
        rows = _rows_of(x, x_y, x_x, x_c, row * S_Y - P_Y, start, S_X, I_Y, I_X, needed, CHANNELS, INDEX)
        taps = _taps((), weight, bias, group.to(INDEX) * K_Y * K_X, slot * S_X + phase, r, w_o, w_r, S_X, K_X, REDUCED)
        for t_y in tl.static_range(K_Y):
            if t_y + 1 < K_Y:
                first = (group.to(INDEX) * K_Y + t_y + 1) * K_X
                taps = _taps(taps, weight, bias, first, slot * S_X + phase, r, w_o, w_r, S_X, K_X, REDUCED)
            kernels = _generated(made, taps[4 * t_y], taps[4 * t_y + 1])
            shifted = _generated(made, taps[4 * t_y + 2], taps[4 * t_y + 3])
            low, high = tl.split(tl.where(odd, shifted, kernels).reshape(tile, COLUMNS // 2, 2))
            pairs = tl.gather(_pairs(low, high, x.dtype.element_ty, PACKED), source, 1)
            band = _band(tl.where(near, pairs, 0), tl.where(near, 0, pairs), x.dtype.element_ty, PACKED)
            bands = _slices(band.reshape(_rows_held(ROWS), COLUMNS, WINDOW), _rows_held(ROWS))
            added = ()
            for y in tl.static_range(ROWS):
                added = added + (tl.dot(rows[y * S_Y + t_y].T, bands[y].T, totals[y]),)
            totals = added
    columns = column + tl.arange(0, COLUMNS).to(INDEX)
    i = tl.arange(0, WINDOW).to(INDEX)
    out += batch * out_b + group.to(INDEX) * CHANNELS * out_c
    for y in tl.static_range(ROWS):
        tl.store(
            out + (row + y) * out_y + columns[:, None] * out_x + i[None, :] * out_c,
            totals[y].T.to(out.dtype.element_ty),
            (columns < O_X)[:, None] & (i < CHANNELS)[None, :] & (row + y < O_Y),
        )


@triton.jit
def _taps(loaded, weight, bias, first, tap, r, w_o, w_r, STEP: tl.constexpr, K_X: tl.constexpr, REDUCED: tl.constexpr):
    """`loaded` with the weights (R, 8) and biases (8,) of the taps `tap` after `first`, and those of the taps before."""
    for shift in tl.static_range(2):
        wanted = tap - shift * STEP
        has = (wanted >= 0) & (wanted < K_X)
        at = weight + (first + wanted)[None, :] * w_o + r[:, None] * w_r
        loaded = loaded + (tl.load(at, has[None, :] & (r < REDUCED)[:, None], 0.0),)
        loaded = loaded + (tl.load(bias + first + wanted, has, 0.0),)
    return loaded


@triton.jit
def _generated(made, weight, bias):
    """The product of features (P, R) and weights (R, 8), and biases (8,), in float32."""
    return tl.dot(made, weight, tl.broadcast_to(bias.to(tl.float32)[None, :], (made.shape[0], bias.shape[0])))


@triton.constexpr_function
def _rows_held(rows):
    """Rows of outputs that a tile has registers for: a power of two, with sixteen outputs at least."""
    return max(2, triton.next_power_of_2(rows))


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS, "taps_of_group"])
def generated_grad_x_tile(
    grad, features, weight, bias, out, x_b, x_c, x_z, x_y, x_x, f_b, f_c, f_z, f_y, f_x, w_o, w_r,
    out_b, out_c, out_z, out_y, out_x, I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    taps_of_group, K_Y: tl.constexpr, K_X: tl.constexpr, TAPS_X: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr,
    REDUCED: tl.constexpr, REDUCED_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    INDEX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of x with kernels generated on the chip: `slide_tile`, TRANSPOSED, as `generated_tile`.

    The kernel is K_Y x K_X taps, every S_Y-th and S_X-th of rows of TAPS_X: what with strides reads one phase of x.

    Pairs are of two neighbouring positions here, whose kernels differ by a step for an input. So the second one's begin
    one slot later, and both of a pair lie in one slot; slots are turned around by the input's column.
    """
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, ROWS, 1, 1)
    row = row.to(INDEX)
    i = tl.arange(0, WINDOW).to(INDEX)
    first_row = row + P_Y - (K_Y - 1)
    sources = strip.to(INDEX) * COLUMNS + P_X - (K_X - 1) + i
    grad += batch * x_b + group.to(INDEX) * CHANNELS * x_c
    needed: tl.constexpr = ROWS + K_Y - 1
    r = tl.arange(0, REDUCED_BLOCK).to(INDEX)
    slot = i % COLUMNS - i // COLUMNS
    t = tl.arange(0, COLUMNS).to(INDEX)[:, None]
    output = group.to(INDEX) * taps_of_group + t * S_Y * TAPS_X + slot[None, :] * S_X
    has = (t < K_Y) & (slot >= 0)[None, :] & (slot < K_X)[None, :]
    at = weight + output[:, :, None] * w_o + r[None, None, :] * w_r
    weights = _slices(tl.load(at, has[:, :, None] & (r < REDUCED)[None, None, :], 0.0), COLUMNS)
    shifts = ()
    for t_y in tl.static_range(K_Y):
        at = bias + group.to(INDEX) * taps_of_group + t_y * S_Y * TAPS_X + slot * S_X
        shifts = shifts + (tl.load(at, (slot >= 0) & (slot < K_X), 0.0).to(tl.float32),)
    n = tl.arange(0, COLUMNS)[:, None]
    m = tl.arange(0, COLUMNS // 2)[None, :]
    steps = n - 2 * m + K_X - 1
    # Of all lanes: along the first axis alone a gather would want another layout than a product has.
    source = ((steps & (COLUMNS - 1)) * (COLUMNS // 2) + m).reshape(1, COLUMNS * COLUMNS // 2)
    from_first = n + 2 * m >= K_X - 1  # n stands for a slot here
    totals = ()
    for y in tl.static_range(ROWS):
        totals = totals + (tl.zeros((WINDOW, COLUMNS), tl.float32),)
    grads_at = grad + sources[:, None] * x_x + i[None, :] * x_c
    made_at = features + batch * f_b + sources[None, :] * f_x + r[:, None] * f_c
    has = (sources >= 0) & (sources < I_X)
    has_grads = has[:, None] & (i < CHANNELS)[None, :]
    has_made = has[None, :] & (r < REDUCED)[:, None]
    grads = ()
    mades = ()
    for k in tl.static_range(_AHEAD):
        grads, mades = _append(grads, mades, grads_at, made_at, first_row + k, x_y, f_y, has_grads, has_made, I_Y)
    for k in tl.static_range(needed):
        if k + _AHEAD < needed:
            grads, mades = _append(
                grads, mades, grads_at, made_at, first_row + k + _AHEAD, x_y, f_y, has_grads, has_made, I_Y
            )
        made = mades[k]
        values = grads[k].T
        added = ()
        for y in tl.static_range(ROWS):
            if y <= k and k - y < K_Y:
                shift = tl.broadcast_to(shifts[K_Y - 1 - (k - y)][:, None], (WINDOW, WINDOW))
                kernels = tl.dot(weights[K_Y - 1 - (k - y)], made, shift).reshape(2, COLUMNS, COLUMNS, 2)
                even, odd = tl.split(kernels)
                low, _ = tl.split(even.permute(1, 2, 0))
                _, high = tl.split(odd.permute(1, 2, 0))
                pairs = _pairs(low, high, grad.dtype.element_ty, PACKED)
                first, second = tl.split(pairs.reshape(COLUMNS, 2, COLUMNS // 2).permute(0, 2, 1))
                pairs = tl.where(from_first, first, second).reshape(1, COLUMNS * COLUMNS // 2)
                pairs = tl.gather(pairs, source, 1).reshape(COLUMNS, COLUMNS // 2)
                near = (steps >= 0) & (steps < COLUMNS)
                far = steps >= COLUMNS
                band = _band(tl.where(near, pairs, 0), tl.where(far, pairs, 0), grad.dtype.element_ty, PACKED)
                added = added + (tl.dot(values, band.T, totals[y]),)
            else:
                added = added + (totals[y],)
        totals = added
    columns = strip.to(INDEX) * COLUMNS + tl.arange(0, COLUMNS).to(INDEX)
    out += batch * out_b + group.to(INDEX) * CHANNELS * out_c
    for y in tl.static_range(ROWS):
        tl.store(
            out + (row + y) * out_y + columns[:, None] * out_x + i[None, :] * out_c,
            totals[y].T.to(out.dtype.element_ty),
            (columns < O_X)[:, None] & (i < CHANNELS)[None, :] & (row + y < O_Y),
        )


@triton.jit
def _append(grads, mades, grads_at, made_at, row, x_y, f_y, has_grads, has_made, rows):
    """`grads` and `mades` with what a row holds of both."""
    has = (row >= 0) & (row < rows)
    grad = tl.load(grads_at + row * x_y, has_grads & has, 0.0)
    return grads + (grad,), mades + (tl.load(made_at + row * f_y, has_made & has, 0.0),)


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS])
def generated_grad_kernel_tile(
    grad, x, pairs_out, g_b, g_c, g_z, g_y, g_x, x_b, x_c, x_z, x_y, x_x,
    I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Y: tl.constexpr, K_X: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, INDEX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`products_tile` that fills (B, O_Y, O_X, groups, K_Y, 4) with pairs of taps.

    So a row of taps has eight places, zero after the last, in line: for S_X = 2 the even taps, then from the fifth place
    on the odd ones. Two rows of outputs are one product for each row of x, in which the pairs of an output stand turned
    around; those of odd columns moreover in halves of two.
    """
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, ROWS, 1, 1)
    row = row.to(INDEX)
    column = strip.to(INDEX) * COLUMNS
    i = tl.arange(0, WINDOW).to(INDEX)
    x += batch * x_b + group.to(INDEX) * CHANNELS * x_c
    needed: tl.constexpr = (ROWS - 1) * S_Y + K_Y
    held: tl.constexpr = _rows_held(ROWS)
    place = tl.arange(0, held * COLUMNS)
    place_row = row + (place // COLUMNS).to(INDEX)
    place_column = column + (place % COLUMNS).to(INDEX)
    grads = tl.load(
        grad + batch * g_b + (place_row * g_y + place_column * g_x)[:, None]
        + (group.to(INDEX) * CHANNELS + i)[None, :] * g_c,
        ((place_row < O_Y) & (place_column < O_X) & (place // COLUMNS < ROWS))[:, None] & (i < CHANNELS)[None, :],
        0.0,
    )  # fmt: skip
    halves: tl.constexpr = COLUMNS // 2
    grads = _slices(grads.reshape(held // 2, WINDOW, WINDOW), held // 2)
    output = tl.arange(0, WINDOW)
    pair = tl.arange(0, halves)[None, :]
    turn = (output % COLUMNS // 2)[:, None]
    near = pair >= turn
    source = (pair + turn) & (halves - 1)
    after = tl.broadcast_to((pair + 1) & (halves - 1), (WINDOW, halves))
    odd = (output % 2 == 1)[:, None]
    lower = output // COLUMNS  # which of two rows
    columns = column + (output % COLUMNS).to(INDEX)
    for phase in tl.static_range(S_X):
        first = column * S_X - P_X + phase
        rows = _rows_of(x, x_y, x_x, x_c, row * S_Y - P_Y, first, S_X, I_Y, I_X, needed, CHANNELS, INDEX)
        tap = 2 * pair * S_X + phase
        real = tl.where(tap < K_X, 0xFFFF, 0) | tl.where(tap + S_X < K_X, 0xFFFF0000, 0)
        for half in tl.static_range((ROWS + 1) // 2):
            here = row + 2 * half + lower.to(INDEX)
            at = pairs_out + ((batch * O_Y + here) * O_X + columns) * (groups * K_Y * halves)
            at = (at + (group.to(INDEX) * K_Y - lower * S_Y) * halves)[:, None] + pair + phase * (halves // S_X)
            inside = (columns < O_X) & (here < O_Y) & (2 * half + lower < ROWS)
            for k in tl.static_range(2 * half * S_Y, min((2 * half + 1) * S_Y + K_Y, needed)):
                product = tl.dot(grads[half], rows[k].T).reshape(WINDOW, 2, halves, 2)
                low, high = tl.split(product)
                first_pairs, second = tl.split(_pairs(low, high, x.dtype.element_ty, PACKED).permute(0, 2, 1))
                pairs = tl.gather(tl.where(near, first_pairs, second), source, 1)
                pairs = tl.where(odd, (pairs >> 16) | (tl.gather(pairs, after, 1) << 16), pairs) & real
                t_y = k - (2 * half + lower) * S_Y
                ok = inside & (t_y >= 0) & (t_y < K_Y)
                tl.store(at + (k - 2 * half * S_Y) * halves, pairs, ok[:, None] & (pair < halves // S_X))


