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


@triton.jit
def _pairs(low, high, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Two float32 as one number, each rounded to a type of two bytes; PACKED: by the instruction that does just this."""
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


@triton.jit
def _row_of(at, row, stride, rows, has):
    """What `at` points to in a row, zero where it has none."""
    return tl.load(at + row * stride, has & (row >= 0) & (row < rows), 0.0)


@triton.jit
def _part_of_row(
    x, row, start, STEP: tl.constexpr, x_y, x_x, I_Y, I_X, CHANNELS: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Sixteen positions of a row, STEP apart, of sixteen channels that x points to."""
    i = tl.arange(0, WINDOW).to(INDEX)
    columns = start + i * STEP
    has = ((columns >= 0) & (columns < I_X))[:, None] & (i < CHANNELS)[None, :]
    return _row_of(x + columns[:, None] * x_x, row, x_y, I_Y, has)


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS, "height"])
def generated_strip(
    x, features, weight, bias, out, x_b, x_c, x_z, x_y, x_x, f_b, f_c, f_z, f_y, f_x, w_o, w_r,
    out_b, out_c, out_z, out_y, out_x, I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    height, K_Y: tl.constexpr, K_X: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr, REDUCED: tl.constexpr,
    REDUCED_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Involution with a kernel weight @ features + bias: a strip of eight columns, two rows of outputs at a time.

    For a row of taps, or every S_X-th of one, the product of features and of these rows of the weight is the kernel of
    each output, in eight slots. For the output of column n it begins at slot n % 2, so that two products, with weights
    shifted by one, serve all outputs, and pairs of slots turned around by n // 2 pairs are the column of the band.
    """
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, 1, 1, 1)
    row = row.to(INDEX) * height
    column = strip.to(INDEX) * COLUMNS
    i = tl.arange(0, WINDOW).to(INDEX)
    r = tl.arange(0, REDUCED_BLOCK).to(INDEX)
    output = tl.arange(0, WINDOW)  # two rows of eight
    taps = ()
    shifts = ()
    for n in tl.static_range(K_Y * S_X):  # row of taps, phase
        tap = (i % COLUMNS - i // COLUMNS) * S_X + n % S_X
        has_tap = (tap >= 0) & (tap < K_X)
        tap += (group.to(INDEX) * K_Y + n // S_X) * K_X
        taps_at = weight + tap[None, :] * w_o + r[:, None] * w_r
        taps = taps + (tl.load(taps_at, has_tap[None, :] & (r < REDUCED)[:, None], 0.0),)
        shifts = shifts + (tl.load(bias + tap, has_tap, 0.0).to(tl.float32)[None, :],)
    pair = tl.arange(0, COLUMNS // 2)[None, :]
    turn = (output % COLUMNS // 2)[:, None]
    source = (pair - turn) & (COLUMNS // 2 - 1)
    near = pair >= turn  # whose pair belongs to the first eight inputs, else to the other eight
    odd = (output % 2 == 1)[:, None]
    x += batch * x_b + group.to(INDEX) * CHANNELS * x_c + i[None, :] * x_c
    lower = (output // COLUMNS).to(INDEX)
    place = column + (output % COLUMNS).to(INDEX)
    made_at = features + batch * f_b + (lower * f_y + place * f_x)[:, None] + r[None, :] * f_c
    has_made = (place < O_X)[:, None] & (r < REDUCED)[None, :]
    columns = column + tl.arange(0, COLUMNS).to(INDEX)
    out_at = out + batch * out_b + group.to(INDEX) * CHANNELS * out_c + columns[:, None] * out_x + i[None, :] * out_c
    has_out = (columns < O_X)[:, None] & (i < CHANNELS)[None, :]
    # Rows of x for two rows of outputs; the next two read most of them again. The others are on their way meanwhile,
    # which Triton does not see to where a row is used in more than one turn.
    rows = ()
    for n in tl.static_range((S_Y + K_Y) * S_X):
        start = column * S_X - P_X + n % S_X
        read = _part_of_row(x, row * S_Y - P_Y + n // S_X, start, S_X, x_y, x_x, I_Y, I_X, CHANNELS, INDEX)
        rows = rows + (read,)
    made = tl.load(made_at + row * f_y, has_made & (row + lower < O_Y)[:, None], 0.0)
    for k in tl.range(0, height, 2, num_stages=1):
        here = row + k
        again = ()
        for n in tl.static_range((S_Y + K_Y) * S_X):
            if n + 2 * S_Y * S_X < (S_Y + K_Y) * S_X:
                again = again + (rows[n + 2 * S_Y * S_X],)
            else:
                start = column * S_X - P_X + n % S_X
                next_row = (here + 2) * S_Y - P_Y + n // S_X
                read = _part_of_row(x, next_row, start, S_X, x_y, x_x, I_Y, I_X, CHANNELS, INDEX)
                again = again + (read,)
        made_next = tl.load(made_at + (here + 2) * f_y, has_made & (here + 2 + lower < O_Y)[:, None], 0.0)
        upper = tl.zeros((WINDOW, COLUMNS), tl.float32)
        under = tl.zeros((WINDOW, COLUMNS), tl.float32)
        for n in tl.static_range(K_Y * S_X):
            both = tl.dot(made, taps[n], tl.broadcast_to(shifts[n], (WINDOW, WINDOW)))
            kernels, shifted = tl.split(both.reshape(WINDOW, 2, COLUMNS).permute(0, 2, 1))
            low, high = tl.split(tl.where(odd, shifted, kernels).reshape(WINDOW, COLUMNS // 2, 2))
            pairs = tl.gather(_pairs(low, high, x.dtype.element_ty, PACKED), source, 1)
            band = _band(tl.where(near, pairs, 0), tl.where(near, 0, pairs), x.dtype.element_ty, PACKED)
            bands = _slices(band.reshape(2, COLUMNS, WINDOW), 2)
            upper = tl.dot(rows[n].T, bands[0].T, upper)
            under = tl.dot(rows[n + S_Y * S_X].T, bands[1].T, under)
        at = out_at + here * out_y
        tl.store(at, upper.T.to(out.dtype.element_ty), has_out & (here < O_Y))
        tl.store(at + out_y, under.T.to(out.dtype.element_ty), has_out & (here + 1 < O_Y) & (k + 1 < height))
        rows = again
        made = made_next


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS, "taps_of_group", "height"])
def generated_grad_x_strip(
    grad, features, weight, bias, out, x_b, x_c, x_z, x_y, x_x, f_b, f_c, f_z, f_y, f_x, w_o, w_r,
    out_b, out_c, out_z, out_y, out_x, I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    taps_of_group, height, K_Y: tl.constexpr, K_X: tl.constexpr, TAPS_X: tl.constexpr, S_Y: tl.constexpr,
    S_X: tl.constexpr, REDUCED: tl.constexpr, REDUCED_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of x with kernels generated on the chip: a strip of eight columns, row by row of the gradient.

    The kernel is K_Y x K_X taps, every S_Y-th and S_X-th of rows of TAPS_X: what with strides reads one phase of x.
    Each row has a part in K_Y rows of the output, which wait in `totals` until they are complete. Pairs are of two
    neighbouring positions here, whose kernels differ by a step for an input. So the second one's begin one slot later,
    both of a pair lie in one slot, and slots are turned around by the input's column.
    """
    batch, _, row, strip, group = _place(groups, row_blocks, strip_blocks, O_Z, 1, 1, 1)
    row = row.to(INDEX) * height
    i = tl.arange(0, WINDOW).to(INDEX)
    r = tl.arange(0, REDUCED_BLOCK).to(INDEX)
    slot = i % COLUMNS - i // COLUMNS
    weights = ()
    shifts = ()
    has = (slot >= 0) & (slot < K_X)
    for t_y in tl.static_range(K_Y):
        output = group.to(INDEX) * taps_of_group + t_y * S_Y * TAPS_X + slot * S_X
        taps = tl.load(weight + output[:, None] * w_o + r[None, :] * w_r, has[:, None] & (r < REDUCED)[None, :], 0.0)
        weights = weights + (taps,)
        shifts = shifts + (tl.load(bias + output, has, 0.0).to(tl.float32),)
    n = tl.arange(0, COLUMNS)[:, None]
    m = tl.arange(0, COLUMNS // 2)[None, :]
    steps = n - 2 * m + K_X - 1
    # Of all lanes: along the first axis alone a gather would want another layout than a product has.
    source = ((steps & (COLUMNS - 1)) * (COLUMNS // 2) + m).reshape(1, COLUMNS * COLUMNS // 2)
    from_first = n + 2 * m >= K_X - 1  # n stands for a slot here
    near = (steps >= 0) & (steps < COLUMNS)
    far = steps >= COLUMNS
    totals = ()
    for t_y in tl.static_range(K_Y):
        totals = totals + (tl.zeros((WINDOW, COLUMNS), tl.float32),)
    read = strip.to(INDEX) * COLUMNS + P_X - (K_X - 1) + i
    has_read = (read >= 0) & (read < I_X)
    grads_at = grad + batch * x_b + group.to(INDEX) * CHANNELS * x_c + read[None, :] * x_x + i[:, None] * x_c
    made_at = features + batch * f_b + read[None, :] * f_x + r[:, None] * f_c
    has_grads = has_read[None, :] & (i < CHANNELS)[:, None]
    has_made = has_read[None, :] & (r < REDUCED)[:, None]
    columns = strip.to(INDEX) * COLUMNS + tl.arange(0, COLUMNS).to(INDEX)
    out_at = out + batch * out_b + group.to(INDEX) * CHANNELS * out_c + columns[:, None] * out_x + i[None, :] * out_c
    has_out = (columns < O_X)[:, None] & (i < CHANNELS)[None, :]
    for k in tl.range(height + K_Y - 1, num_stages=3):  # two rows are on their way while one is worked on
        here = row + P_Y - (K_Y - 1) + k
        values = _row_of(grads_at, here, x_y, I_Y, has_grads)
        made = _row_of(made_at, here, f_y, I_Y, has_made)
        added = ()
        for t_y in tl.static_range(K_Y):
            kernels = tl.dot(weights[t_y], made, tl.broadcast_to(shifts[t_y][:, None], (WINDOW, WINDOW)))
            even, odd = tl.split(kernels.reshape(2, COLUMNS, COLUMNS, 2))
            low, _low = tl.split(even.permute(1, 2, 0))
            _high, high = tl.split(odd.permute(1, 2, 0))
            pairs = _pairs(low, high, grad.dtype.element_ty, PACKED)
            first, second = tl.split(pairs.reshape(COLUMNS, 2, COLUMNS // 2).permute(0, 2, 1))
            pairs = tl.where(from_first, first, second).reshape(1, COLUMNS * COLUMNS // 2)
            pairs = tl.gather(pairs, source, 1).reshape(COLUMNS, COLUMNS // 2)
            band = _band(tl.where(near, pairs, 0), tl.where(far, pairs, 0), grad.dtype.element_ty, PACKED)
            added = added + (tl.dot(values, band.T, totals[t_y]),)
        done = row + k - (K_Y - 1)
        result = added[0].T.to(out.dtype.element_ty)
        tl.store(out_at + done * out_y, result, has_out & (k >= K_Y - 1) & (done < O_Y))
        totals = ()
        for t_y in tl.static_range(K_Y - 1):
            totals = totals + (added[t_y + 1],)
        totals = totals + (tl.zeros((WINDOW, COLUMNS), tl.float32),)


@triton.constexpr_function
def _rows_held(rows):
    """Rows of outputs that a tile has registers for: a power of two, with sixteen outputs at least."""
    return max(2, triton.next_power_of_2(rows))


@triton.jit(do_not_specialize=[*_SIZES, *_COUNTS])
def generated_grad_kernel_tile(
    grad, x, pairs_out, g_b, g_c, g_z, g_y, g_x, x_b, x_c, x_z, x_y, x_x,
    I_Z, I_Y, I_X, O_Z, O_Y, O_X, P_Z, P_Y, P_X, groups, row_blocks, strip_blocks,
    K_Y: tl.constexpr, K_X: tl.constexpr, S_Y: tl.constexpr, S_X: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, INDEX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`products_tile` that fills (B, O_Y, O_X, groups, K_Y, 4) with pairs of taps.

    So a row of taps has eight places, zero after the last, in line; for S_X = 2 the first four are those of even taps,
    the others those of odd ones. Two rows of outputs are one product for each row of x, in which the pairs of an output
    stand turned around; those of odd columns moreover in halves of two.
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
