"""What `bench shards` shows: the model's tables, and what was counted next to what it says."""

from ..report import markdown_table, number, provenance
from . import model, simulation

ROWS, VOCAB, ITEMSIZE, HIDDEN = 32768, 262144, 2, 4096
RANKS = 1, 2, 4, 8, 16, 32, 64
# Bytes a second that data sheets promise; nothing here was measured.
MEMORY, NVLINK, NETWORK = 4.8e12, 450e9, 50e9
MARGIN = 0.05  # of the peak: rows' numbers that the model leaves out
# Of the gradient, relative to its largest entry; bfloat16 is rounded twice: for rows and the mean.
ERRORS = {"float32": 1e-5, "bfloat16": 1.1 * 2.0**-8}
TIMED = model.ONE_PASS, model.REDUCTIONS, model.TRANSPOSED, model.GATHERED


def costs(ways=model.WAYS):
    """[(R, {way: `Cost`})] of the published sizes."""
    sizes = [model.Sizes(ROWS, VOCAB, ranks, ITEMSIZE) for ranks in RANKS]
    return [(x, {way: model.cost(way, x) for way in ways}) for x in sizes]


def tables():
    """(title, header, rows) of what the model says of the published sizes, as text."""
    yield (
        "MB that a rank receives from others",
        ["TP", *model.WAYS],
        [
            [str(x.ranks), *(shown(each.received / 1e6) for each in found.values())]
            for x, found in costs()
        ],
    )
    yield (
        "GB at once beyond the two shards, the gradient's shard among them",
        ["TP", "a shard", *model.WAYS],
        [
            [str(x.ranks), shown(x.shard / 1e9), *(shown(y.peak / 1e9) for y in found.values())]
            for x, found in costs()
        ],
    )
    rows = []
    for x, _ in costs(()):
        if x.ranks == 1:
            continue
        chunk = model.rows_of_chunk(x)
        found = model.heads(x, HIDDEN, chunk)
        rows.append([str(x.ranks), f"{chunk:,}", str(found.collectives)])
        rows[-1] += [shown(found.received / 1e6), shown(found.peak / 1e9)]
    header = ["TP", "rows of a chunk", "collectives", "MB received", "GB at once"]
    yield f"Of heads, H = {HIDDEN:,}, whose logits come in chunks", header, rows
    header = ["TP"]
    for way in TIMED:
        header += [f"{way}: memory, ms", "450 GB/s", "50 GB/s"]
    rows = []
    for x, found in costs(TIMED):
        cells = [
            shown(1e3 * seconds)
            for each in found.values()
            for seconds in (each.moved / MEMORY, each.received / NVLINK, each.received / NETWORK)
        ]
        rows.append([str(x.ranks), *cells])
    yield "Assumed: ms of a rank's memory at 4.8 TB/s, and of what it receives", header, rows


def shown(x):
    return number(x) if x else "0"


def crossovers():
    """Where one way becomes better than another, in sentences."""
    columns = {x: model.least_columns(x) for x in (2, 4)}
    ranks = {vocab: model.most_ranks(vocab, 2) for vocab in (32000, 128256, VOCAB)}
    times = [model.ranks_of_equal_time(VOCAB, ITEMSIZE, link, MEMORY) for link in (NVLINK, NETWORK)]
    return [
        f"Statistics are fewer bytes than gathering while a rank has more than {columns[2]:.0f} "
        f"columns in 16 bits, {columns[4]:.0f} in 32.",
        "They are fewer than whole rows up to TP "
        + ", ".join(f"{x:.0f} at V = {vocab:,}" for vocab, x in ranks.items())
        + ", in 16 bits: V grows with the square of TP.",
        f"At V = {VOCAB:,} receiving them takes as long as reading and writing the shards at TP "
        f"{times[0]:.0f} with 450 GB/s, at TP {times[1]:.0f} with 50 GB/s. Assumed, not measured.",
    ]


def model_page():
    blocks = [
        f"N = {ROWS:,} rows, V = {VOCAB:,}, bfloat16; forward KL and cross-entropy with the "
        "gradient, and the JSD. By the formulas."
    ]
    for title, header, rows in tables():
        blocks += [f"{title}:", markdown_table(header, rows)]
    blocks.append("\n".join(f"- {line}" for line in crossovers()))
    return "\n\n".join(blocks)


# What was counted


CHECK_HEADER = ["", "TP", "dtype", "collectives", "bytes received", "by the model"]
CHECK_HEADER += ["peak, bytes", "÷ the model's", "gradient's error"]


def check_rows(records):
    """Under CHECK_HEADER, as text."""
    return [
        [
            line["way"],
            str(line["ranks"]),
            line["dtype"],
            str(line["collectives"]),
            f"{line['received']:,.0f}",
            f"{line['received_model']:,.0f}",
            f"{line['peak']:,}",
            f"{line['peak'] / line['peak_model']:.3f}",
            f"{line['gradient_error']:.1e}",
        ]
        for line in records
    ]


def wrong(line):
    """What a record is not as it should be in; None where all is."""
    if line["gradient_error"] > ERRORS[line["dtype"]] or line["loss_error"] > 1e-5:
        return "another loss or gradient than the definition"
    for name in ("collectives", "received"):
        if line[name] != line[f"{name}_model"]:
            return f"{name}: {line[name]:,.0f}, by the model {line[f'{name}_model']:,.0f}"
    if abs(line["peak"] / line["peak_model"] - 1) > MARGIN:
        return f"peak: {line['peak']:,}, by the model {line['peak_model']:,}"
    return None


def check_page(document):
    """As Markdown, with what has to be known to read it."""
    run = document["settings"]
    over = {"cpu": "gloo", "cuda": "NCCL"}[run["device"]]
    off = sum(wrong(line) is not None for line in document["rows"])
    note = (
        f"{run['rows']:,} × {run['vocab']:,}; heads: H = {simulation.HIDDEN}, "
        f"{simulation.CHUNKS} chunks. A process for each rank on one machine, over {over}. "
        f"{off or 'None'} of {len(document['rows'])} lines are off: collectives or bytes, recorded "
        "where PyTorch dispatches them, that are not the model's, tensors at once that are more "
        f"than {MARGIN:.0%} from it, a loss or gradient that is not the float64 definition's. "
        f"On {provenance(document['machine'])}"
    )
    return f"{markdown_table(CHECK_HEADER, check_rows(document['rows']))}\n\n{note}"
