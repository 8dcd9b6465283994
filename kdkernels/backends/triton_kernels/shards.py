"""The dense operators where a device has some of the columns of each row: kdkernels/parallel/.

Three launches. The first finds the statistics of these columns; merged over all devices, they come
back as what another sweep needs of the columns elsewhere: for D and its mean slope, of divergences
whose gradient holds a sum over the row, and for the gradient. A label may be elsewhere too: then it
is in no tile, and its logit comes with what is merged.
"""

import triton
import triton.language as tl

from .arithmetic import INFINITY, TwoFloats, anchor, multiply, row_sum, some
from .distill import (
    Sizes,
    Strides,
    compared,
    fill_columns,
    index_from,
    row_at,
    weight_of,
    write_gradient,
)
from .divergence import FORWARD_KL, contribution
from .gradient import (
    Slope,
    element_of,
    hard_normaliser,
    make_frame,
    slope_sums,
    sum_of_offsets,
)
from .statistics import Kind, Row, Sums, columns_from, logits, statistics, stride_of
from .team import FIELDS, Team, team_sum

# csrc/common/args.h: Phase, and what it says of labels
STATISTICS = tl.constexpr(0)
TERMS = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
OUT_OF_RANGE = tl.constexpr(-2)

# ops.py counts what statistics, merged statistics and terms hold.
COUNT = tl.constexpr(9)
MERGED = tl.constexpr(10)
TERM_COUNT = tl.constexpr(3)


@triton.jit
def shard_rows_at(
    task, sizes, strides, student, teacher, grad, labels, weights, first, begin, end, empty, kind
):
    """`Row`; main: something is wanted of it, which is NaN where its label is out of range."""
    index = index_from(first, kind.ROWS)
    inside = index < sizes.rows
    label = index * 0 - 1
    counts = inside
    if labels is not None:
        label = tl.load(labels + index, mask=inside, other=-1)
        counts = inside & (label != sizes.ignore_index)
    weight = weight_of(weights, index, inside)
    bad = counts & (label == OUT_OF_RANGE)
    main = tl.where(empty, False, counts & ((weight != 0.0) | (task.want_terms != 0.0)))
    read = main & ~bad
    here = read & (label >= 0)
    of = index, inside, bad, main, read, weight
    return row_at(task, sizes, strides, student, teacher, grad, of, label, here, begin, end, kind)


@triton.jit
def labelled(row, s_label):
    """The row with its label's logit, wherever that is."""
    return Row(
        row.index,
        row.inside,
        row.bad,
        row.main,
        row.read,
        row.weight,
        row.student,
        row.teacher,
        row.grad,
        row.label,
        s_label,
        row.t_label,
        row.begin,
        row.end,
        row.s,
        row.t,
    )


@triton.jit
def put(out, field: tl.constexpr, COUNT: tl.constexpr, rows, row, hi, lo, team):
    """A field of the row in two floats, by the first of its programs."""
    writes = tl.where(team.rank == 0, row.inside, False)
    count = tl.cast(rows, tl.int64)
    place = out + field * count + row.index
    hi = tl.where(row.main, tl.where(row.bad, float("nan"), hi), 0.0)
    tl.store(place, hi, mask=writes)
    tl.store(place + COUNT * count, tl.where(row.read, lo, 0.0), mask=writes)


@triton.jit
def put_nothing(out, COUNT: tl.constexpr, rows, row, team):
    zero = (row.index * 0).to(tl.float32)
    for field in tl.static_range(COUNT):
        put(out, field, COUNT, rows, row, zero, zero, team)


@triton.jit
def take(merged, field: tl.constexpr, COUNT: tl.constexpr, rows, row):
    """What `put` has written, once merged."""
    count = tl.cast(rows, tl.int64)
    place = merged + field * count + row.index
    hi = tl.load(place, mask=row.read, other=0.0)
    return TwoFloats(hi, tl.load(place + COUNT * count, mask=row.read, other=0.0))


@triton.jit
def report_label(bad_label, row, team):
    writes = tl.where(team.rank == 0, row.inside & row.bad, False)
    tl.store(bad_label + row.index * 0, row.index + 1, mask=writes)


# ---- Statistics ----------------------------------------------------------------------------------


@triton.jit
def near_kl(task, row, frame, team, kind):
    """The forward KL, term by term."""
    lanes = tl.zeros((kind.ROWS, kind.CHUNKS, 1), tl.float32)
    for start in range(row.begin, row.end, kind.CHUNKS * 8):
        s, t = logits(task, row, columns_from(start, kind.CHUNKS), kind)
        x = element_of(task, s, t, frame)
        of = contribution(x, task.w_p, task.w_q, kind.DIVERGENCE)
        lanes += tl.sum(of.term, 2, keep_dims=True)
    return team_sum(row_sum(lanes, kind.ROWS), team, kind)


@triton.jit
def comparison(task, row, sums, team, kind):
    """log(z_s / z_t), and the forward KL where that is the divergence; 0 where a side has nothing
    here."""
    ok = row.read & (sums.z_s > 0.0) & (sums.z_t > 0.0)
    log, kl, far_from, team = compared(task, row, sums, ok, team, kind)
    if kind.DIVERGENCE == FORWARD_KL:
        far = ok & (kl >= far_from) & (kl < INFINITY)
        if some(ok & ~far, kind.ROWS):
            near, team = near_kl(task, row, make_frame(task, sums, log), team, kind)
            kl = tl.where(far, kl, near)
    else:
        kl = tl.zeros_like(kl)
    log = TwoFloats(tl.where(ok, log.hi, 0.0), tl.where(ok, log.lo, 0.0))
    return log, tl.where(ok, kl, 0.0), team


@triton.jit
def write_statistics(task, sizes, row, out, team, kind):
    zero = (row.index * 0).to(tl.float32)
    sums = Sums(zero, zero, zero, zero, zero, zero)
    log = TwoFloats(zero, zero)
    kl = zero
    offset = zero
    if some(row.read, kind.ROWS):
        sums, team = statistics(task, row, team, kind)
        if kind.DISTILL:
            log, kl, team = comparison(task, row, sums, team, kind)
        if kind.HARD:
            if task.label_smoothing != 0.0:
                offset, team = sum_of_offsets(task, row, anchor(sums.max_s), team, kind)
    z_rest = sums.z_rest
    if kind.HARD:
        # NaN of a label that is that or infinite, which Σ_{j≠y} does not see.
        z = hard_normaliser(row, sums)
        z_rest = tl.where(z == z, z_rest, z)
    rows = sizes.rows
    put(out, 0, COUNT, rows, row, sums.max_s, zero, team)
    put(out, 1, COUNT, rows, row, sums.z_s, zero, team)
    put(out, 2, COUNT, rows, row, z_rest, zero, team)
    put(out, 3, COUNT, rows, row, row.s_label, zero, team)
    put(out, 4, COUNT, rows, row, offset, zero, team)
    put(out, 5, COUNT, rows, row, sums.max_t, zero, team)
    put(out, 6, COUNT, rows, row, sums.z_t, zero, team)
    put(out, 7, COUNT, rows, row, log.hi, log.lo, team)
    put(out, 8, COUNT, rows, row, kl, zero, team)
    return team


# ---- Merged over all devices ---------------------------------------------------------------------


@triton.jit
def merged_sums(merged, rows, row):
    """`Sums` and log(z_s / z_t) of the whole row."""
    max_s = take(merged, 0, MERGED, rows, row).hi
    z_s = take(merged, 1, MERGED, rows, row).hi
    z_rest = take(merged, 2, MERGED, rows, row).hi
    max_t = take(merged, 5, MERGED, rows, row).hi
    z_t = take(merged, 6, MERGED, rows, row).hi
    log = take(merged, 7, MERGED, rows, row)
    return Sums(max_s, max_t, z_s, z_t, tl.zeros_like(z_s), z_rest), log


@triton.jit
def write_terms(task, sizes, row, merged, out, team, kind):
    """What these columns add to D, Σ q and Σ q φ."""
    zero = (row.index * 0).to(tl.float32)
    value = zero
    mass = TwoFloats(zero, zero)
    slope = TwoFloats(zero, zero)
    if some(row.read, kind.ROWS):
        sums, log = merged_sums(merged, sizes.rows, row)
        frame = make_frame(task, sums, log)
        value, mass, slope, team = slope_sums(task, row, frame, team, kind)
        ok = (sums.z_s > 0.0) & (sums.z_t > 0.0)
        value = tl.where(ok, value, float("nan"))
    put(out, 0, TERM_COUNT, sizes.rows, row, value, zero, team)
    put(out, 1, TERM_COUNT, sizes.rows, row, mass.hi, mass.lo, team)
    put(out, 2, TERM_COUNT, sizes.rows, row, slope.hi, slope.lo, team)
    return team


@triton.jit
def write_shard_gradient(task, sizes, row, merged, unscale, inverse, empty, team, kind):
    zero = (row.index * 0).to(tl.float32)
    prescale = zero + 1.0
    fill = tl.where(row.main, tl.where(row.bad, float("nan"), 1.0), 0.0)
    if some(row.read, kind.ROWS):
        rows = sizes.rows
        scale = multiply(TwoFloats(row.weight, zero), inverse)
        sums, log = merged_sums(merged, rows, row)
        row = labelled(row, take(merged, 3, MERGED, rows, row).hi)
        kl = take(merged, 8, MERGED, rows, row).hi
        mean = take(merged, 9, MERGED, rows, row)
        # A NaN or +inf among the logits of any device, or nothing but −inf on all of them.
        ok = row.read & (tl.abs(mean.hi) < INFINITY)
        if kind.DISTILL:
            ok = ok & (sums.z_s > 0.0) & (sums.z_t > 0.0)
        if kind.HARD:
            ok = ok & (hard_normaliser(row, sums) > 0.0)
        fill = tl.where(row.main & ~ok, float("nan"), fill)
        frame = make_frame(task, sums, log)
        slope = Slope(kl, mean.hi, mean.lo)
        if kind.DISTILL:
            far = ok & ~ok
            if kind.DIVERGENCE == FORWARD_KL:
                far_from = (1.0 + tl.abs(log.hi)) * task.far_from
                far = ok & (kl >= far_from) & (kl < INFINITY)
            if kind.DIVERGENCE != FORWARD_KL or kind.HALF or some(ok & ~far, kind.ROWS):
                _, prescale, team = write_gradient(
                    task, row, sums, frame, slope, far, fill, scale, team, True, kind
                )
            else:
                _, prescale, team = write_gradient(
                    task, row, sums, frame, slope, far, fill, scale, team, False, kind
                )
        else:
            _, prescale, team = write_gradient(
                task, row, sums, frame, slope, ok, fill, scale, team, kind.HALF, kind
            )
    else:
        fill_columns(row, fill, row.begin, row.end, kind.CHUNKS * 8, kind)
    finish_gradient(sizes, row, unscale, empty, prescale, team, kind)
    return team


@triton.jit
def finish_gradient(sizes, row, unscale, empty, prescale, team, kind):
    """The padding, and 1 / the scale of a float16 row."""
    tile: tl.constexpr = kind.CHUNKS * 8
    padding = sizes.columns + team.rank * tile
    fill_columns(row, 0.0, padding, sizes.width, kind.PROGRAMS * tile, kind)
    if kind.HALF:
        writes = tl.where(team.rank == 0, row.inside, False)
        remaining = tl.where(empty, 0.0, tl.div_rn(1.0, prescale))
        tl.store(unscale + row.index, remaining, mask=writes)


@triton.jit(do_not_specialize=[*Sizes._fields, *Strides._fields])
def shard_rows(
    task,  # as in distill.py, where nothing else is said
    student,
    teacher,
    grad,  # or None, as all that its phase does not take
    labels,  # int64 (N) or None: columns here, or what csrc/common/args.h says
    weights,
    mean,
    merged,  # float32 (2, MERGED, N): in two floats, statistics and the mean slope
    out,  # float32 (2, COUNT, N) or (2, TERM_COUNT, N)
    unscale,
    bad_label,
    board,
    arrivals,
    rows,
    length,
    width,
    columns,
    ignore_index,
    student_b,
    student_l,
    teacher_b,
    teacher_l,
    grad_b,
    grad_l,
    PHASE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    DISTILL: tl.constexpr,
    HARD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    HELD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    HALF: tl.constexpr = student.dtype.element_ty == tl.float16
    kind: tl.constexpr = Kind(
        DIVERGENCE,
        DISTILL,
        HARD,
        PHASE == GRADIENT,
        HALF,
        ROWS,
        CHUNKS,
        WHOLE,
        HELD,
        PROGRAMS,
        PROJECTED,
    )
    sizes = Sizes(rows, length, width, columns, ignore_index)
    strides = Strides(
        stride_of(student_b, WHOLE),
        stride_of(student_l, WHOLE),
        stride_of(teacher_b, WHOLE),
        stride_of(teacher_l, WHOLE),
        stride_of(grad_b, WHOLE),
        stride_of(grad_l, WHOLE),
    )
    rank = tl.program_id(0) % PROGRAMS
    number = tl.program_id(0) // PROGRAMS
    teams = tl.num_programs(0) // PROGRAMS
    board += number * (2 * PROGRAMS * FIELDS)
    team = Team(board, arrivals + number, rank, rank * 0)
    inverse = TwoFloats(tl.load(mean), tl.load(mean + 1))
    empty = tl.load(mean + 2) != 0.0
    share = tl.cdiv(columns, PROGRAMS * 8) * 8
    begin = rank * share
    end = tl.minimum(begin + share, columns)
    for first in range(number * ROWS, rows, teams * ROWS):
        row = shard_rows_at(
            task,
            sizes,
            strides,
            student,
            teacher,
            grad,
            labels,
            weights,
            first,
            begin,
            end,
            empty,
            kind,
        )
        if PHASE == STATISTICS:
            team = write_statistics(task, sizes, row, out, team, kind)
            report_label(bad_label, row, team)
        elif PHASE == TERMS:
            team = write_terms(task, sizes, row, merged, out, team, kind)
        else:
            team = write_shard_gradient(
                task, sizes, row, merged, unscale, inverse, empty, team, kind
            )
