"""The Triton kernels of ``triton_mlp``: products of expert rows, their epilogues, and sums by token and by expert.

    rows          y[n] = epilogue(x[source n] w[e]^T)          one tile of rows belongs to one expert
    hidden_grad   from dY W_out and the kept pre-activation: dh, weight * a, and the routing weights' gradient
    weight_grad   dw[e] = g[rows of e]^T x[rows of e]          the rows of an expert are the summed dimension
    sum_tokens    out[t] = sum of the rows of token t          gathers: no atomics, the same order every time
    sum_experts   out[e] = sum of the rows of expert e

A tile is BM rows of one expert times BN columns. ``tiles`` says on the device which expert and which first row a tile
of rows has: counts are never read by the host, and nothing is compiled again when they change. The programs of
``rows`` and ``hidden_grad`` are as many as the GPU holds at once, and each takes every so-manieth tile, in an order
that reuses tiles of w while they are in the L2 cache (Triton's tutorial on persistent matrix products).

Rows beyond the counts belong to nobody: they have no tile. Tiles read past the edges of a row block or of the columns
from safe places, and what comes of it is not stored; only along the summed dimension are edges filled with zeros, in
both operands, so that no other row's NaN gets in.

UPCAST is for Triton's interpreter, whose ``dot`` takes the bits of bfloat16 for integers.
"""

import triton
import triton.language as tl


@triton.jit
def tiles(counts, ends, tile_expert, tile_row, num_tiles, E, BM: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """Where each expert's rows end [E], and of each tile of BM rows the expert and the first row."""
    expert = tl.arange(0, BE)
    count = tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32)
    row_end = tl.cumsum(count, 0)
    tile_end = tl.cumsum((count + BM - 1) // BM, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + expert, row_end, mask=expert < E)
        tl.store(num_tiles, tl.max(tile_end, 0))
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    before = tile_end[None, :] <= tile[:, None]
    first_tile = tl.max(tl.where(before, tile_end[None, :], 0), 1)
    first_row = tl.max(tl.where(before, row_end[None, :], 0), 1)
    inside = tile < tl.max(tile_end, 0)
    tl.store(tile_expert + tile, tl.sum(before.to(tl.int32), 1), mask=inside)
    tl.store(tile_row + tile, first_row + (tile - first_tile) * BM, mask=inside)


@triton.jit
def _place(tile, num_m, NUM_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows and of columns comes ``tile``-th: GROUP tiles of rows go through all columns together."""
    per_group = GROUP * NUM_N
    first = tile // per_group * GROUP
    size = tl.minimum(num_m - first, GROUP)
    inside = tile % per_group
    return first + inside % size, inside // size


@triton.jit
def _load(at, ok_one, ok_other, EVEN_ONE: tl.constexpr, EVEN_OTHER: tl.constexpr):
    """What lies at these places, 0 where not both are ok; without a mask for what is even: then all is ok."""
    if EVEN_ONE and EVEN_OTHER:
        tile = tl.load(at)
    elif EVEN_OTHER:
        tile = tl.load(at, mask=ok_one, other=0.0)
    elif EVEN_ONE:
        tile = tl.load(at, mask=ok_other, other=0.0)
    else:
        tile = tl.load(at, mask=ok_one & ok_other, other=0.0)
    return tile


@triton.jit
def _load_x(x, source_M, first_row, k, K: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """Columns k to k + BK of the rows. [BM, BK]"""
    column = k + tl.arange(0, BK)
    if TMA:
        tile = x.load([first_row, k])
    else:
        tile = _load(x + source_M[:, None] * K + column[None, :], True, column[None, :] < K, True, K % BK == 0)
    return tile


@triton.jit
def _load_w(
    w, expert, n, k, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile of an expert's matrix: of [N, K] where TRANSPOSED, else of [K, N]. [BK, BN]

    Where GATED the matrix is [2N, K], and to the right of the gate's columns stand those that it multiplies.
    [BK, 2 BN]
    """
    WIDE: tl.constexpr = 2 * BN if GATED else BN
    if TMA:
        # a gated matrix counts as two, which one block reaches over
        if TRANSPOSED:
            tile = w.load([expert * (2 if GATED else 1), n, k]).reshape(WIDE, BK).T
        else:
            tile = w.load([expert, k, n]).reshape(BK, BN)
    else:
        column = tl.arange(0, WIDE)
        ok = n + column % BN < N
        depth = k + tl.arange(0, BK)
        if TRANSPOSED:
            if GATED:
                column = tl.where(column < BN, column, column - BN + N)
            row = expert.to(tl.int64) * (2 * N if GATED else N) + n + column
            at = w + row[None, :] * K + depth[:, None]
        else:
            at = w + (expert.to(tl.int64) * K + depth)[:, None] * N + (n + column)[None, :]
        tile = _load(at, depth[:, None] < K, ok[None, :], K % BK == 0, N % BN == 0)
    return tile


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr):
    """f(h) and f'(h) of an activation that is not gated."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        return h * cdf, cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u)
        s = _sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return h * s, s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    elif ACTIVATION == "silu":
        s = _sigmoid(h)
        return h * s, s + h * s * (1 - s)
    else:
        positive = tl.where(h <= 0, 0.0, h)  # keeps NaN
        if ACTIVATION == "relu2":
            return positive * positive, 2 * positive
        else:
            return positive, tl.where(h <= 0, 0.0, 1.0)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    BM: tl.constexpr = tile.shape[0]
    BN: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def rows(
    x, token, w, bias, weight, h, y,
    ends, tile_expert, tile_row, num_tiles,
    K: tl.constexpr, N: tl.constexpr,
    GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    KEEP: tl.constexpr, WEIGHTED: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """y[n] = weight[n] f(x[source n] w[e]^T + bias[e]), [N rows, N]; where KEEP, h is what f is applied to.

    w is [E, N, K] where TRANSPOSED, else [E, K, N]. Where GATED it is [E, 2N, K], and a tile has BN of the gate's
    columns and those of the same numbers that the gate multiplies.
    """
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * N if GATED else N
    num_m = tl.load(num_tiles)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _place(tile, num_m, NUM_N, GROUP)
        expert, first_row, n = tl.load(tile_expert + tile_m), tl.load(tile_row + tile_m), tile_n * BN
        row_M = first_row + tl.arange(0, BM)
        row_ok_M = row_M < tl.load(ends + expert)
        row_M = tl.where(row_ok_M, row_M, first_row)
        source_M = (tl.load(token + row_M) if GATHER else row_M).to(tl.int64)
        total = tl.zeros((BM, 2 * BN if GATED else BN), tl.float32)
        for k in tl.range(0, K, BK):
            x_tile = _load_x(x, source_M, first_row, k, K, BK, X_TMA)
            w_tile = _load_w(w, expert, n, k, N, K, BN, BK, TRANSPOSED, GATED, W_TMA)
            total = _dot(x_tile, w_tile, total, PRECISION, UPCAST)
        if GATED:
            total, total_up = _halves(total)

        column = n + tl.arange(0, BN)
        ok = row_ok_M[:, None] & (column < N)[None, :]
        # one 64-bit place a tile, 32-bit ones inside it
        inside = tl.arange(0, BM)[:, None] * WIDTH + tl.arange(0, BN)[None, :]
        h_at = h + first_row.to(tl.int64) * WIDTH + n + inside
        if BIAS:
            total += tl.load(bias + expert * WIDTH + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(h_at, total.to(h.dtype.element_ty), mask=ok)
        if ACTIVATION != "none":
            total, _ = _activate(total, ACTIVATION)
        if GATED:
            if BIAS:
                up_bias = tl.load(bias + expert * WIDTH + N + column, mask=column < N, other=0.0)
                total_up += up_bias.to(tl.float32)[None, :]
            if KEEP:
                tl.store(h_at + N, total_up.to(h.dtype.element_ty), mask=ok)
            total *= total_up
        if WEIGHTED:
            total *= tl.load(weight + row_M)[:, None]
        y_at = y + first_row.to(tl.int64) * N + n + tl.arange(0, BM)[:, None] * N + tl.arange(0, BN)[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _hidden_grad_piece(
    da, first_row, n, row_ok_M, weight, h, a, dh,
    N: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Columns n and following of ``hidden_grad``: stores what is theirs; their share of <da, a>. [BM]"""
    BM: tl.constexpr = da.shape[0]
    BN: tl.constexpr = da.shape[1]
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    ok = row_ok_M[:, None] & (n + column < N)[None, :]
    # one 64-bit place a tile, 32-bit ones inside it
    at = first_row.to(tl.int64) * WIDTH + n
    inside = row[:, None] * WIDTH + column[None, :]
    gate, slope = _activate(tl.load(h + at + inside, mask=ok, other=0.0).to(tl.float32), ACTIVATION)
    value = gate
    if GATED:
        up = tl.load(h + at + N + inside, mask=ok, other=0.0).to(tl.float32)
        value = gate * up
    share_M = tl.sum(da * value, 1)
    if WEIGHTED:
        weight_M1 = tl.load(weight + first_row + row, mask=row_ok_M, other=0.0)[:, None]
        da *= weight_M1
        value *= weight_M1
    a_at = a + first_row.to(tl.int64) * N + n + row[:, None] * N + column[None, :]
    tl.store(a_at, value.to(a.dtype.element_ty), mask=ok)
    if GATED:
        tl.store(dh + at + N + inside, (da * gate).to(dh.dtype.element_ty), mask=ok)
        da *= up
    tl.store(dh + at + inside, (da * slope).to(dh.dtype.element_ty), mask=ok)
    return share_M


@triton.jit
def _hidden_grad_two(
    da, first_row, n, row_ok_M, weight, h, a, dh,
    N: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    left, right = _halves(da)
    one_M = _hidden_grad_piece(left, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED)
    n += left.shape[1]
    other_M = _hidden_grad_piece(right, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED)
    return one_M + other_M


@triton.jit
def _hidden_grad_pieces(
    da, first_row, n, row_ok_M, weight, h, a, dh,
    N: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """The tile in 1, 2 or 4 pieces, one after the other: what lives at once must fit into the registers."""
    if PIECES == 1:
        share_M = _hidden_grad_piece(
            da, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED
        )
    elif PIECES == 2:
        share_M = _hidden_grad_two(da, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED)
    else:
        left, right = _halves(da)
        share_M = _hidden_grad_two(
            left, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED
        )
        n += left.shape[1]
        share_M += _hidden_grad_two(
            right, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED
        )
    return share_M


@triton.jit(do_not_specialize=["num_rows"])
def hidden_grad(
    dy, token, w_out, weight, h, a, dh, dweight, num_rows,
    ends, tile_expert, tile_row, num_tiles,
    K: tl.constexpr, N: tl.constexpr,
    GATHER: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """From da[n] = dY[source n] w_out[e]: weight a [rows, N], dh [rows, N or 2N] and <da, a>, with a = f(h).

    <da, a> is the gradient of the routing weight but for the bias: no output of the experts is needed. It is written
    for each tile of columns, [NUM_N, rows], and summed afterwards.
    """
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * N if GATED else N
    num_m = tl.load(num_tiles)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _place(tile, num_m, NUM_N, GROUP)
        expert, first_row, n = tl.load(tile_expert + tile_m), tl.load(tile_row + tile_m), tile_n * BN
        row_M = first_row + tl.arange(0, BM)
        row_ok_M = row_M < tl.load(ends + expert)
        row_M = tl.where(row_ok_M, row_M, first_row)
        source_M = (tl.load(token + row_M) if GATHER else row_M).to(tl.int64)
        da = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK):
            dy_tile = _load_x(dy, source_M, first_row, k, K, BK, X_TMA)
            w_tile = _load_w(w_out, expert, n, k, N, K, BN, BK, False, False, W_TMA)
            da = _dot(dy_tile, w_tile, da, PRECISION, UPCAST)

        share_M = _hidden_grad_pieces(
            da, first_row, n, row_ok_M, weight, h, a, dh, N, WIDTH, ACTIVATION, GATED, WEIGHTED, PIECES
        )
        if NEED_WEIGHT:
            tl.store(dweight + tile_n.to(tl.int64) * num_rows + row_M, share_M, mask=row_ok_M)


@triton.jit
def weight_grad(
    g, x, token, dw, ends,
    M: tl.constexpr, N: tl.constexpr,
    GATHER_G: tl.constexpr, GATHER_X: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw[e] = g[rows of e]^T x[rows of e], [E, M, N]; g or x is gathered by token. One program a tile: how long one
    takes depends on its expert's count, and the GPU hands out the next where one ends."""
    NUM_M: tl.constexpr = (M + BM - 1) // BM
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    expert = tl.program_id(0) // (NUM_M * NUM_N)
    tile_m, tile_n = _place(tl.program_id(0) % (NUM_M * NUM_N), NUM_M, NUM_N, GROUP)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for first_row in tl.range(start, end, BK):
        row_K = first_row + tl.arange(0, BK)
        ok_K = row_K < end
        source_K = row_K
        if GATHER_G or GATHER_X:
            source_K = tl.load(token + row_K, mask=ok_K, other=0)
        g_row_K = (source_K if GATHER_G else row_K).to(tl.int64)
        x_row_K = (source_K if GATHER_X else row_K).to(tl.int64)
        g_tile = _load(g + g_row_K[:, None] * M + m[None, :], ok_K[:, None], m[None, :] < M, False, M % BM == 0)
        x_tile = _load(x + x_row_K[:, None] * N + n[None, :], ok_K[:, None], n[None, :] < N, False, N % BN == 0)
        total = _dot(g_tile.T, x_tile, total, PRECISION, UPCAST)
    at = dw + (expert.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(at, total.to(dw.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def row_products(
    dy, token, bias, dweight, ends, tile_expert, tile_row, num_tiles,
    N: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dweight[n] = <dY[source n], bias[e]>: the share of the output's bias in the routing weight's gradient."""
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles):
        return
    expert, first_row = tl.load(tile_expert + tile), tl.load(tile_row + tile)
    row_M = first_row + tl.arange(0, BM)
    ok_M = row_M < tl.load(ends + expert)
    source_M = (tl.load(token + row_M, mask=ok_M, other=0) if GATHER else row_M).to(tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for n in tl.range(0, N, BN):
        column = n + tl.arange(0, BN)
        ok = ok_M[:, None] & (column < N)[None, :]
        dy_tile = tl.load(dy + source_M[:, None] * N + column[None, :], mask=ok, other=0.0).to(tl.float32)
        total += dy_tile * tl.load(bias + expert * N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(dweight + row_M, tl.sum(total, 1), mask=ok_M)


@triton.jit
def sum_tokens(rows_in, order, starts, out, N: tl.constexpr, BN: tl.constexpr, TOGETHER: tl.constexpr):
    """out[t] = sum of rows_in[order[i]] for i from starts[t] to starts[t + 1], in float32. TOGETHER rows at a time are
    on their way from memory."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    end = tl.load(starts + token + 1)
    total = tl.zeros((BN,), tl.float32)
    for first in tl.range(tl.load(starts + token), end, TOGETHER):
        for i in tl.static_range(TOGETHER):
            ok = first + i < end
            row = tl.load(order + first + i, mask=ok, other=0).to(tl.int64)
            columns = tl.where(ok, N, 0)
            total += tl.load(rows_in + row * N + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + token * N + column, total.to(out.dtype.element_ty), mask=column < N)


@triton.jit
def sum_experts(
    rows_in, token, weight, out, ends,
    N: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows n of e of weight[n] rows_in[source n], in float32. [E, N]"""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    end = tl.load(ends + expert)
    total = tl.zeros((BR, BN), tl.float32)
    for first_row in tl.range(tl.load(ends + expert - 1, mask=expert > 0, other=0), end, BR):
        row_R = first_row + tl.arange(0, BR)
        ok_R = row_R < end
        source_R = (tl.load(token + row_R, mask=ok_R, other=0) if GATHER else row_R).to(tl.int64)
        ok = ok_R[:, None] & (column < N)[None, :]
        tile = tl.load(rows_in + source_R[:, None] * N + column[None, :], mask=ok, other=0.0).to(tl.float32)
        if WEIGHTED:
            tile *= tl.load(weight + row_R, mask=ok_R, other=0.0)[:, None]
        total += tile
    tl.store(out + expert.to(tl.int64) * N + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < N)
