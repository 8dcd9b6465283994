"""A case with all who can compute it: each is checked, then they are timed in turns.

A number is published only with what makes it comparable: everything that it is compared with ran in
the same process, in turns with it, and was checked against the float64 definition first.
"""

import contextlib
import functools
import gc
import math
import statistics
import sys
import time

import torch

from . import definition
from .case import Step
from .peers.base import Lacks, Missing

START = time.perf_counter()
REPEATED_SECONDS = 2e-3  # what takes less is called several times in one measurement
MOST_REPEATS = 100
ROUNDS_SECONDS = 20.0  # rounds are added while all of them take no longer

MEASURED = (
    "status loss_error gradient_error calls ms ms_min ms_max times_native times_native_min "
    "times_native_max times_products times_products_min times_products_max share_of_copy "
    "share_of_copy_min share_of_copy_max bytes gb_per_s flops tflop_per_s exponentials gexp_per_s "
    "peak_mb peak_percent gradient_mb"
).split()


def say(text):
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


def record(case, name, title):
    """One line of the result files; every line has the same fields."""
    fields = dict.fromkeys(MEASURED)
    ours = name in case.variants and case.variants[name].ours
    return {**case.record(), "variant": name, "title": title, "ours": ours, **fields}


@contextlib.contextmanager
def noting(line):
    """What keeps a variant from being measured becomes the status of its line, and ends no run."""
    try:
        yield
    except Lacks as what:
        line["status"] = f"lacks: {what}"
    except Missing as why:
        line["status"] = f"missing: {why}"
    except Exception as error:  # another library's, or its compiler's
        if out_of_memory(error):
            line["status"] = "out of memory"
            return
        lines = [text for text in str(error).splitlines() if text.strip()]
        line["status"] = f"failed: {type(error).__name__}: {lines[0] if lines else ''}"


def out_of_memory(error):
    """On a CPU torch has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Run:
    """Cases one after the other, on one device -> records.

    Args:
        device: of `devices`.
        rounds: how often each variant is timed, at least, in turns.
        patience: seconds; what takes longer in its first call is not called again: that was its
            time. (Of what is compiled there, as everything on a GPU, it is the second call.)
        memory: whether to measure peaks.
    """

    def __init__(self, device, rounds, patience, memory=True):
        self.device, self.rounds, self.patience, self.memory = device, rounds, patience, memory
        self.wrong = set()  # (case with its gradient, variant): the loss alone can look right

    def measure(self, case, names):
        """Records of the variants `names`, as far as the case has them, and of its yardsticks."""
        if case.device == "cpu":
            torch.set_num_threads(case.threads)
        # Each shape for itself: what was compiled before would make it dynamic, or be the limit.
        torch.compiler.reset()
        say(f"{case.title}: checking")
        variants = {name: case.variants[name] for name in names if name in case.variants}
        lines = {name: record(case, name, each.title) for name, each in variants.items()}
        try:
            self.compare(case, variants, lines)
        except Exception as error:
            if not out_of_memory(error):
                raise
            for line in lines.values():
                line["status"] = "out of memory: the inputs and their definition do not fit"
        if self.memory and case.backward and case.device == "cpu":
            for name in variants:
                if lines[name]["status"] == "ok":
                    lines[name].update(self.peak(case, name))
        return list(lines.values())

    def compare(self, case, variants, lines):
        """Check and time, into `lines`; nothing of it is in memory afterwards."""
        inputs = case.draw()
        expected = case.definitions(inputs)
        makers, seconds = {}, {}
        for name, variant in variants.items():
            with noting(lines[name]):
                loss = variant.make(case)
                self.device.release()
                maker = functools.partial(Step, loss, case, inputs, variant.overwrites)
                took = self.check(maker(), variant, name, expected, lines[name])
                if lines[name]["status"] == "ok":
                    makers[name], seconds[name] = maker, [took]
            Step(None, case, inputs).drop()
        del expected
        for name, yardstick in case.yardsticks.items():
            lines[name] = record(case, name, yardstick.title)
            with noting(lines[name]):
                self.device.release()
                maker = functools.partial(yardstick, case, inputs)
                seconds[name] = [self.turn(maker)]
                makers[name], lines[name]["status"] = maker, "ok"

        again = {name: make for name, make in makers.items() if seconds[name][0] <= self.patience}
        timed = self.take_turns(again, seconds, case, lines)
        for name in again:
            if name in timed:
                seconds[name] = timed[name]
            else:
                del seconds[name]
        for name in seconds:
            lines[name].update(speed(case, name, seconds))

    def check(self, step, variant, name, expected, line):
        """Compare what a variant computes with the definition -> seconds of a call."""
        case = step.case
        step.prepare()
        took = self.device.seconds(step)
        observed = None
        if self.device.compiles or variant.compiled or took <= self.patience:
            for gradient in step.gradients():
                # The next one is likely to get this memory: what is not written there stays NaN.
                gradient.fill_(math.nan)
            gradient = None
            step.prepare()
            took, observed = self.device.observed(lambda: self.device.seconds(step))
        found = definition.errors(step, expected)
        allowed = definition.TOLERANCES[case.suite, case.dtype][variant.accuracy]
        line["status"] = definition.verdict(found, allowed)
        line["loss_error"], line["gradient_error"] = found
        if observed is not None and self.memory:
            line.update(peak_fields(case, observed, step.gradient_bytes()))
        if line["status"] != "ok" and case.backward:
            self.wrong.add((case, name))
        elif (case.with_gradient(), name) in self.wrong:
            line["status"] = "wrong: its gradient is"
        step.drop()
        return took

    def turn(self, maker, repeat=1, expected=0.0):
        """Seconds of one call, which is expected to take so many."""
        step = maker()
        step.prepare()
        if expected <= self.device.warm:
            step.run()
            step.prepare()
        took = self.device.seconds(step, repeat)
        step.drop()
        return took

    def repeats(self, case, name, seconds):
        """Calls in one measurement: several of what is short, where a call can be repeated."""
        variant = case.variants.get(name)
        if self.device.name == "cuda" or (variant and variant.overwrites and case.backward):
            return 1
        return max(1, min(MOST_REPEATS, math.ceil(REPEATED_SECONDS / seconds)))

    def take_turns(self, makers, seconds, case, lines):
        """Time the variants in turns; between them nothing is kept that would take their memory.

        Returns:
            {name: [seconds of a call, one for each round]}, without what failed: `lines` say why.
        """
        if not makers:
            return {}
        repeats = {name: self.repeats(case, name, seconds[name][0]) for name in makers}
        expected = {name: seconds[name][0] for name in makers}
        calls = {name: n + (expected[name] <= self.device.warm) for name, n in repeats.items()}
        total = sum(expected[name] * calls[name] for name in makers)
        most = self.device.more_rounds * self.rounds
        rounds = int(min(max(ROUNDS_SECONDS / total, self.rounds), most))
        say(f"{case.title}: {rounds} rounds of {', '.join(makers)}")
        timed = {name: [] for name in makers}
        gc.collect()
        gc.freeze()  # so that the collections below have little to look at
        gc.disable()
        try:
            for _ in range(rounds):
                for name in list(timed):
                    before = lines[name]["status"]
                    with noting(lines[name]):
                        timed[name].append(self.turn(makers[name], repeats[name], expected[name]))
                    if lines[name]["status"] != before:
                        del timed[name]
                    gc.collect()
        finally:
            gc.enable()
            gc.unfreeze()
        return timed

    def peak(self, case, name):
        """What a call takes beyond inputs and gradients, as fields of a record; or none."""
        say(f"{case.title}: memory of {case.variants[name].title}")
        try:
            return peak_fields(case, *self.device.peak(case, name))
        except Exception as error:  # of the process that measures it; the time stands
            say(f"no peak: {type(error).__name__}: {error}")
            return {}


def peak_fields(case, peak, gradient):
    beyond = peak - gradient
    return {
        "peak_mb": beyond / 1e6,
        "peak_percent": 100 * beyond / (4 * case.rows * case.vocab),
        "gradient_mb": gradient / 1e6,
    }


def spread(name, values):
    """The median, lowest and highest as fields of a record."""
    median, low, high = statistics.median(values), min(values), max(values)
    return {name: median, f"{name}_min": low, f"{name}_max": high}


def ratios(above, below):
    """Of two variants' seconds, round by round; to the median, of what had but one call."""
    if len(above) != len(below):
        if len(above) == 1:
            below = [statistics.median(below)]
        else:
            below = [statistics.median(below)] * len(above)
    return [a / b for a, b in zip(above, below, strict=True)]


def speed(case, name, seconds):
    """What a variant's seconds come to, next to the others'."""
    own = seconds[name]
    fields = {"calls": len(own), **spread("ms", [1e3 * s for s in own])}
    median = statistics.median(own)
    if case.base in seconds and name in case.variants:
        fields.update(spread("times_native", ratios(own, seconds[case.base])))
    if "products" in seconds:
        fields.update(spread("times_products", ratios(own, seconds["products"])))
    if "copy" in seconds and (name in case.variants or name == "copy"):
        fields.update(spread("share_of_copy", ratios(seconds["copy"], own)))
        fields.update(bytes=case.bytes, gb_per_s=case.bytes / median / 1e9)
    if case.exponentials is not None and name != "copy":
        fields.update(exponentials=case.exponentials, gexp_per_s=case.exponentials / median / 1e9)
    if case.flops is not None:
        fields.update(flops=case.flops, tflop_per_s=case.flops / median / 1e12)
    return fields
