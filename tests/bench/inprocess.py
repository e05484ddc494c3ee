"""Peers without a server, run with their own Python: PEFT's mixed batch, transformers' generate and its continuous
batching. One static batch of all requests of a job; times of tokens are those of the calls that make them.

    python inprocess.py JOB.json      measures for each line of its input and prints a JSON line; then one about itself
"""

import itertools
import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
torch.set_num_threads(2)


class Clock:
    """A streamer that notes when each step of `generate` ends."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def pss_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def static_batch(model, ids, num_new, extra):
    """Seconds from the start to each step's end."""
    clock = Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
            do_sample=False, pad_token_id=0, stopping_criteria=[clock], **extra,
        )  # fmt: skip
    assert out.shape[1] == ids.shape[1] + num_new
    return [t - start for t in clock.times]


def continuous(model, prompts, num_new):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    start = time.perf_counter()
    out = model.generate_batch(inputs=prompts, generation_config=config)
    seconds = time.perf_counter() - start
    assert all(len(result.generated_tokens) == num_new for result in out.values())
    return seconds


def figures(prompts, num_new, seconds, times=None):
    num_new_all = num_new * len(prompts)
    out = {
        "output_tokens_per_s": num_new_all / seconds,
        "total_tokens_per_s": (num_new_all + sum(map(len, prompts))) / seconds,
        "errors": 0,
        "seconds": seconds,
    }
    if times:
        gaps = sorted((b - a) * 1e3 for a, b in itertools.pairwise(times))
        for percent in (50, 95, 99):
            out[f"ttft_p{percent}_s"] = times[0]
            out[f"itl_p{percent}_ms"] = gaps[min(len(gaps) - 1, round(percent / 100 * (len(gaps) - 1)))]
    return out


def measure(model, job, num_new, extra):
    """All requests of the job, so many streams at a time."""
    prompts, streams = job["prompts"], job["num_streams"]
    seconds, times = 0.0, []
    for first in range(0, len(prompts), streams):
        some = prompts[first : first + streams]
        if job["how"] == "cb":
            seconds += continuous(model, some, num_new)
        else:
            part = {k: v[first : first + streams] for k, v in extra.items()}
            times = static_batch(model, torch.tensor(some), num_new, part)
            seconds += times[-1]
    return figures(prompts, num_new, seconds, times)


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    how, num_new, dtype = job["how"], job["num_new"], getattr(torch, job["dtype"])
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=dtype, attn_implementation="paged|sdpa" if how == "cb" else "sdpa"
    ).eval()
    names = list(job["adapters"])
    if how == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapters"][names[0]], names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.load_adapter(job["adapters"][name], adapter_name=name, autocast_adapter_dtype=False)
        model = model.to(dtype).eval()
    start_s = time.perf_counter() - begin
    extra = {"adapter_names": job["names"]} if how == "peft" else {}
    measure(model, job, 4, extra)  # warms up
    for _ in sys.stdin:
        print(json.dumps(measure(model, job, num_new, extra)), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    print(json.dumps({"memory_bytes": pss_bytes(), "start_s": start_s, "versions": versions}))


main()
