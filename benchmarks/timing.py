"""Time callables in turn, so that whatever else the machine does meets all of them alike; their peak memory; whether
they wait for the GPU."""
import gc
import statistics
import time

import torch

FLUSH_BYTES = 2 ** 28  # written between two calls on a GPU, so that none finds its inputs in the L2 cache


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60] if str(error).strip() else ''}"


def one_time(call, prepare, device, flush=None):
    """Milliseconds that the CPU worked on a call, all threads together; on a GPU a pair of events around it."""
    prepare()
    if device == "cpu":
        started = time.process_time()
        call()
        return 1000 * (time.process_time() - started)
    if flush is not None:
        flush.zero_()
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    events[0].record()
    call()
    events[1].record()
    return events


def rounds(calls, device, repeats=20, warmup=3, flush=True):
    """{name: call or (call, prepare)} -> {name: milliseconds of each round}; for a call that raises a string: why.

    Every round makes every call once. prepare() runs before each call and is not timed.
    """
    calls = {name: call if isinstance(call, tuple) else (call, lambda: None) for name, call in calls.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if flush and device != "cpu" else None
    times, failed = {name: [] for name in calls}, {}
    for number in range(warmup + repeats):
        for name, (call, prepare) in calls.items():
            if name in failed:
                continue
            try:
                spent = one_time(call, prepare, device, flush)
                if number < warmup and device != "cpu":
                    torch.cuda.synchronize()  # what a kernel has to complain about belongs to this name
            except Exception as error:  # out of memory, a backend that cannot do it, a compiler that gives up
                failed[name] = first_line(error)
                del error
                free()
                continue
            if number >= warmup:
                times[name].append(spent)
    if device != "cpu":
        torch.cuda.synchronize()
        times = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
    return {name: failed.get(name) or values for name, values in times.items()}


def in_turn(calls, device, repeats=20, warmup=3, flush=True):
    """The median of each call's rounds, or why there is none."""
    return {name: values if isinstance(values, str) else statistics.median(values)
            for name, values in rounds(calls, device, repeats, warmup, flush).items()}


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(call):
    """Bytes of GPU memory that a call needs at most beyond what is there when it starts; or the reason, a string."""
    free()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        result = call()
    except Exception as error:
        return first_line(error)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def step_times(calls, device, rounds=6, in_a_row=3, warmup=1):
    """Median milliseconds of a step of each kind, or why there is none.

    In every round each kind takes some steps in a row and starts with nothing queued: where launching is what takes
    the time, as it may in a small model, no slower neighbour hides it.
    """
    def several(call):
        return lambda: [call() for _ in range(in_a_row)], torch.cuda.synchronize

    times = in_turn({name: several(call) for name, call in calls.items()}, device, rounds, warmup, flush=False)
    return {name: ms if isinstance(ms, str) else ms / in_a_row for name, ms in times.items()}


def peak_of(call, steps=3):
    """Largest memory of some steps after two others, the whole of the card's; or why it failed."""
    try:
        call(), call()
        free()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    except Exception as error:  # out of memory, of shared memory, or a compiler's
        return first_line(error)
    finally:
        free()


def waits(what, call):
    """Whether anything in the call waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        return {"what": what, "waits for the device": "never"}
    except RuntimeError as error:
        return {"what": what, "waits for the device": first_line(error)}
    finally:
        torch.cuda.set_sync_debug_mode("default")


def goal(what, limit, found, least=False):
    """A row: what was to be reached, at most or at least, and whether it was; found may be a reason instead."""
    measured = isinstance(found, (int, float))
    met = measured and (found >= limit if least else found <= limit)
    return {"goal": f"{what}: at {'least' if least else 'most'} {limit:.3g}", "measured": found,
            "result": "met" if met else "missed" if measured else "not measured"}


def divided(a, b):
    """a / b, or None where one of them is a reason instead of a number."""
    return a / b if all(isinstance(x, (int, float)) for x in (a, b)) and b else None
