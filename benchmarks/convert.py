"""Seconds, GB/s and peak memory of `modellink.convert`, beside loading and saving the same files with transformers.

    python benchmarks/convert.py [--layers 24] [--rounds 5] [--folder TEMPORARY] [--output benchmarks/results]

A Llama of 1.2 billion random bf16 weights, in several safetensors shards, goes to Megatron-Core at TP2 PP2 and back,
with and without verification; transformers does `from_pretrained` in bf16 and `save_pretrained`. Every run is a new
process on two cores; rounds are interleaved, so that a busy machine hurts all alike, and the page cache holds the files
(they were just written). Seconds count the call, without imports and including the time until everything is on disk:
`convert` syncs what it writes, and after `save_pretrained` the clock stops when `sync` has returned (the time before
that is reported too). Peak memory is VmHWM of the process: interpreter, libraries and mapped files included.

The last round's result is compared with the source, tensor by tensor, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(folder: Path, layers: int, shard_bytes: int = 500_000_000) -> None:
    """Write the source model."""
    import torch
    from safetensors.torch import save_file

    hidden, width, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    keys = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{place}.self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"}
        shapes |= {f"{place}.mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{place}.mlp.down_proj.weight"] = (hidden, width)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    generator = torch.Generator().manual_seed(1)
    shards: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        tensor = torch.empty(shape).normal_(0.0, 0.02, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes // 2 > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.bfloat16()
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def _peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def _measured(job: Callable[[], object]) -> None:
    """Run `job` and print what it took as JSON."""
    before = _peak()
    start, used = time.perf_counter(), time.process_time()
    job()
    returned = time.perf_counter() - start
    used = time.process_time() - used
    os.sync()
    durable = time.perf_counter() - start
    print(json.dumps({"returned": returned, "seconds": durable, "cpu": used, "peak": _peak(), "imports": before}))


def child(kind: str, source: Path, target: Path, workers: int | None) -> None:
    """One measured run."""
    if kind == "build":
        build(target, int(source.name))
    elif kind == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        def load_and_save() -> None:
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)

        _measured(load_and_save)
    else:
        from modellink.checkpoint.convert import convert

        to, _, unverified = kind.partition(" ")
        sizes: dict[str, int] = {"tensor_parallel": 2, "pipeline_parallel": 2} if to == "mcore" else {}
        options: dict[str, Any] = {"verify": not unverified, "workers": workers, "progress": False}
        _measured(lambda: convert(source, target, to, **sizes, **options))


def run(kind: str, source: Path, target: Path, workers: int | None) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--child", kind, str(source), str(target)]
    command += ["--workers", str(workers)] if workers else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) if kind != "build" else {}


def same_tensors(one: Path, other: Path) -> int:
    """The number of tensors, once both folders are found to hold the same bytes under the same names."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Any]:
        files = sorted(folder.glob("*.safetensors"))
        handles = [safe_open(file, framework="pt") for file in files]
        return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    ours, theirs = tensors(one), tensors(other)
    if ours.keys() != theirs.keys():
        raise SystemExit("the round trip lost tensors")
    for name in ours:
        pair = [held[name].get_tensor(name).view(torch.int16) for held in (ours, theirs)]
        if not torch.equal(*pair):
            raise SystemExit(f"the round trip changed {name}")
    return len(ours)


def measure(folder: Path, layers: int, rounds: int, workers: int | None) -> dict[str, Any]:
    source, core, back, peer = (folder / name for name in ("source", "mcore", "back", "peer"))
    run("build", Path(str(layers)), source, None)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    kinds = {
        "HF -> mcore TP2 PP2": ("mcore", source, core),
        "HF -> mcore TP2 PP2, --no-verify": ("mcore unverified", source, core),
        "mcore TP2 PP2 -> HF": ("hf", core, back),
        "mcore TP2 PP2 -> HF, --no-verify": ("hf unverified", core, back),
        "transformers, load and save": ("transformers", source, peer),
    }
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in kinds}
    for number in range(rounds):
        for label, (kind, origin, target) in kinds.items():
            runs[label].append(run(kind, origin, target, workers))
            print(f"round {number + 1}: {label}: {runs[label][-1]}", flush=True)
    return {
        "bytes": size,
        "layers": layers,
        "shards": len(list(source.glob("*.safetensors"))),
        "tensors": same_tensors(source, back),
        "runs": runs,
    }


def table(result: dict[str, Any]) -> list[str]:
    peer = result["runs"]["transformers, load and save"]
    median = {key: statistics.median(run[key] for run in peer) for key in ("seconds", "peak")}
    lines = [
        "| run | seconds, median | lowest to highest | until the call returned | CPU seconds | GB/s "
        "| times transformers | peak memory | of transformers' |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, runs in result["runs"].items():
        seconds = [run["seconds"] for run in runs]
        middle, peak = statistics.median(seconds), max(run["peak"] for run in runs)
        returned, used = (statistics.median(run[key] for run in runs) for key in ("returned", "cpu"))
        lines.append(
            f"| {label} | {middle:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {returned:.2f} | {used:.2f} | "
            f"{result['bytes'] / 1e9 / middle:.2f} | {middle / median['seconds']:.2f} | {peak / 2**20:,.0f} MiB | "
            f"{peak / median['peak']:.0%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--output", type=Path, help="folder for a dated table and JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, source, target = arguments.child
        child(kind, Path(source), Path(target), arguments.workers)
        return
    if len(os.sched_getaffinity(0)) > 2:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.layers, arguments.rounds, arguments.workers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "safetensors", "transformers"))
    cores = f"2 CPU cores ({platform.machine()}), {memory:.0f} GiB of memory"
    result["machine"] = f"{cores}; Python {platform.python_version()}, {versions}"
    result["load_average_at_the_end"] = os.getloadavg()[0]
    lines = table(result)
    print("\n".join(lines))
    if arguments.output:
        date = datetime.now(UTC).date().isoformat()
        heading = (
            f"# convert, {date}\n\nLlama of {result['bytes'] / 2e9:.2f} billion random bf16 weights "
            f"({result['bytes'] / 1e9:.2f} GB in {result['shards']} safetensors files, {result['tensors']} tensors, "
            f"the largest 131 MB), {arguments.rounds} interleaved rounds; {result['machine']}; load average at the end "
            f"{result['load_average_at_the_end']:.1f}.\n\nSeconds until everything is on disk, without imports. After "
            "the last round the tensors that came back were\ncompared with the source byte for byte.\n\n"
        )
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"{date}-convert.md").write_text(heading + "\n".join(lines) + "\n")
        (arguments.output / f"{date}-convert.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
