"""The planner's arithmetic is that of the network, its gradients and its optimizer; its answer is a command."""

import contextlib
import itertools
import shlex

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import jit_accel.model.functional as functional
import jit_accel.model.transformer as transformer
from jit_accel.base.devices import peak_flops
from jit_accel.config.command_line import parse_args
from jit_accel.config.costs import block_matrices, block_params, num_params
from jit_accel.config.presets import PRESETS, parse_model_name
from jit_accel.model import blocks
from jit_accel.plan import main
from jit_accel.plan.gpus import GPUS
from jit_accel.plan.memory import (
    MUON_BUCKET_BYTES,
    Division,
    Workload,
    bytes_of_block,
    bytes_of_checkpoint,
    memory_of,
    muon_bytes,
)
from jit_accel.plan.run import divisors
from jit_accel.plan.speed import exchange_seconds, gather_seconds, step_seconds
from jit_accel.train.muon import BUCKET_BYTES, Muon
from jit_accel.train.optimizers import is_block_matrix

CPU = torch.device("cpu")
H16 = ["--config", "launch/recipes/imagenet256_h16.yaml", "--gpu", "H100"]


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize(("patch", "classes"), [(4, 10), (16, 1000)])
def test_weights_are_counted_as_the_network_has_them(size, patch, classes):
    with torch.device("meta"):
        network = transformer.build_model(f"{size}/{patch}", 16 * patch, classes)
    sizes, _ = parse_model_name(f"{size}/{patch}")
    assert num_params(sizes, patch, classes) == sum(p.numel() for p in network.parameters())
    assert block_params(sizes) == sum(p.numel() for p in network.blocks[0].parameters())
    matrices = [p.numel() for name, p in network.named_parameters() if is_block_matrix(name, p)]
    assert block_matrices(sizes) * sizes.depth == sum(matrices)


class GpuProcessor(blocks.AttentionProcessor):
    """Attention as it is computed on a GPU."""

    def __call__(self, attn, x, rope):
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        q, k = attn.q_norm(q, rope), attn.k_norm(k, rope)
        out = blocks.dispatch_attention_fn(q.to(v.dtype), k.to(v.dtype), v)
        return attn.proj_dropout(attn.proj(out.flatten(2).to(x.dtype)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("patch", [4, 16])
def test_a_block_keeps_what_autograd_keeps(monkeypatch, patch, device, precision):
    """A GPU's formulas run on the CPU here: what is kept is theirs."""
    sizes, images = PRESETS["JiT-S"], 4
    work, grid = Workload(sizes, patch, 64, 10, precision=precision), 64 // patch
    block = blocks.JiTBlock(sizes.hidden_size, sizes.num_heads, sizes.mlp_ratio, 0.0, 0.0)
    if device == "cuda":
        monkeypatch.setattr(functional, "_by_hand", lambda x: False)
        block.attn.set_processor(GpuProcessor())
    kept, held = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        held.append(tensor)
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    class Hooks(torch.autograd.graph.saved_tensors_hooks):
        """Those that a block has of its own, which see what these here then do not."""

        def __init__(self, pack, unpack):
            def pack_and_keep(tensor):
                packed = pack(tensor)
                return keep(packed) if isinstance(packed, torch.Tensor) else packed

            super().__init__(pack_and_keep, unpack)

    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Hooks)
    rope = functional.rope_table(sizes.hidden_size // sizes.num_heads, (grid, grid), grid, sizes.in_context_len, CPU)
    x = torch.ones(images, work.length, sizes.hidden_size, requires_grad=True)
    c = torch.ones(images, sizes.hidden_size, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with autocast, hooks(keep, lambda tensor: tensor):
        block(x, c, rope)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    casts = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2) if precision == "bf16" else 0
    total = sum(size for place, size in kept.items() if place not in own) - casts
    of_images = 3 * images * 6 * sizes.hidden_size * 4  # their modulation, which is not counted
    assert bytes_of_block(work, images, device)[0] == pytest.approx(total, rel=0.01, abs=of_images)


def test_what_a_step_of_muon_works_with_is_counted():
    """The most that is allocated in a step on this CPU, beside weights, gradients and momentum."""
    work = Workload(*parse_model_name("JiT-S/16"), 64, 10, "muon")
    with torch.device("meta"):
        network = transformer.build_model("JiT-S/16", 64, 10)
    matrices = [torch.zeros(p.shape) for name, p in network.named_parameters() if is_block_matrix(name, p)]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    optimizer = Muon(matrices, ns_steps=1)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    layout = Division("ddp", False, 8, 1)
    assert muon_bytes(work, layout, "cpu") == pytest.approx(max(itertools.accumulate(sizes)), rel=0.1)


def test_planner_and_muon_agree_on_the_size_of_a_bucket():
    assert MUON_BUCKET_BYTES == BUCKET_BYTES


def test_muon_of_shared_matrices_works_with_less():
    """A bucket of each process holds whole maps, at least one; none holds more than its share of all."""
    for model in ("JiT-B/16", "JiT-G/16"):
        work = Workload(*parse_model_name(model), 256, 1000, "muon")
        needs = [muon_bytes(work, Division("fsdp2", False, 8, 1, 64, shards)) for shards in (1, 8, 64)]
        assert needs == sorted(needs, reverse=True)
    assert muon_bytes(Workload(*parse_model_name("JiT-G/16"), 256, 1000), Division("ddp", False, 8, 1)) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_are_those_of_the_optimizer_and_a_checkpoint_holds_them(optimizer):
    work = Workload(*parse_model_name("JiT-Ti/4"), 32, 10, optimizer, averages=3)
    one = memory_of(work, Division("ddp", False, 2, 1))
    assert one.averages == 3 * one.weights
    assert one.moments < 2 * one.weights if optimizer == "muon" else one.moments == 2 * one.weights
    assert bytes_of_checkpoint(work) == one.weights + one.moments + one.averages


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", ["JiT-Ti/4", "JiT-H/16"])
def test_more_shards_recomputation_and_smaller_batches_never_need_more(model, recompute):
    work = Workload(*parse_model_name(model), 256, 1000)

    def peak(recompute=recompute, batch=8, shards=1, processes=16):
        return memory_of(work, Division("x", recompute, batch, 1, processes, shards)).peak

    assert peak(batch=4) < peak()
    assert peak(recompute=True) <= peak(recompute=False)
    if model == "JiT-H/16":  # a small network's gathered blocks are more than its shards save
        assert peak(shards=16) < peak(shards=8) < peak()


@pytest.mark.parametrize("number", [1, 2, 36, 97, 1024, 3000])
def test_a_share_is_divided_in_all_ways(number):
    assert divisors(number) == [size for size in range(number, 0, -1) if number % size == 0]


def test_every_gpu_has_a_peak_rate():
    assert [name for name in GPUS if not peak_flops(name.removesuffix(" 40GB"), "bf16")] == []


def test_nothing_travels_in_a_run_of_one_process_and_all_of_it_at_the_slower_link():
    work, gpu = Workload(*parse_model_name("JiT-B/16"), 256, 1000), GPUS["H100"]
    assert exchange_seconds(work, Division("ddp", False, 8, 1), gpu, 1) == (0, 0)
    assert gather_seconds(7e9, gpu, 8, 1) == pytest.approx(7e9 * 7 / 8 / (0.7 * 450e9))
    assert gather_seconds(7e9, gpu, 1, 4) == pytest.approx(7e9 * 3 / 4 / (0.7 * 50e9))
    ddp, hsdp, fsdp2 = (
        sum(exchange_seconds(work, Division(name, False, 8, 1, 16, shards), gpu, 2))
        for name, shards in (("ddp", 1), ("hsdp", 8), ("fsdp2", 16))
    )
    assert min(ddp, hsdp, fsdp2) > 0


def test_what_travels_for_one_pass_is_not_hidden_by_the_other():
    """Gathered weights that the forward pass waits for cost their time, however long the backward pass is."""
    work, gpu = Workload(*parse_model_name("JiT-B/16"), 256, 1000), GPUS["L40S"]
    layout = Division("fsdp2", False, 8, 8, 8, 8)
    gathers, rest = exchange_seconds(work, layout, gpu, 1)
    assert rest == pytest.approx(gathers * 10 / 8)  # eight gathers more, and sums of float32
    products, waits = step_seconds(work, layout, gpu, 1, 1e12)
    assert waits == 0  # a slow GPU
    flops = 1e12 * products / (gathers * 21 / 8)  # of a GPU whose forward passes are a gather shorter than the gathers
    assert step_seconds(work, layout, gpu, 1, flops) == pytest.approx((gathers * 21 / 8, gathers / 8))


def planned(capsys, *flags):
    code = main(list(flags))
    out = capsys.readouterr().out
    return code, out, out.splitlines()[-1]


@pytest.mark.parametrize(
    "flags",
    [
        [*H16, "--num_gpus", "16", "--nodes", "2", "--global_batch_size", "1024"],
        [*H16, "--num_gpus", "8"],
        [*H16, "--num_gpus=8", "--gradient_checkpointing", "--data_path", "a folder"],
        ["--model", "JiT-G/16", "--batch_size", "64", "--gpu", "L40S", "--num_gpus", "64", "--nodes", "8"],
        ["--gpu", "RTX 4090", "--num_gpus", "1", "--batch_size", "256", "--model", "JiT-L/16"],
        ["--gpu", "A100 40GB", "--optimizer", "muon", "--mixed_precision", "no"],
        ["--gpu", "A100", "--num_gpus", "2", "--nodes", "2", "--model", "JiT-G/16"],
    ],
)
def test_the_recommended_command_is_the_asked_training_divided_otherwise(capsys, flags):
    code, out, command = planned(capsys, *flags)
    assert code == 0, out
    words = shlex.split(command)
    config = parse_args(words[words.index("jit_accel.train") + 1 :])
    processes = int(words[words.index("--num_processes") + 1])
    images = config.optim.batch_size * config.optim.gradient_accumulation_steps * processes
    assert f"steps of {images:,} images" in out
    recommended = next(line for line in out.splitlines() if line.startswith("Recommended"))
    assert ("no recomputation" in recommended) is not config.performance.gradient_checkpointing
    assert "a folder" not in flags or config.data.data_path == "a folder"
    if "--nodes" in flags:  # 0, as in fsdp2.yaml, is another port on each machine
        assert words[words.index("--main_process_port") + 1] != "0"
    if ", hsdp" in recommended.replace(":", ","):
        assert "--parallelism_config_dp_replicate_size" in words


def test_a_condition_is_planned_for(capsys):
    how = ("--gpu", "H100", "--num_gpus", "1", "--model", "JiT-B/16")
    for channels, flags in ((0, ()), (1, ("--condition_from", "grey"))):
        with torch.device("meta"):
            network = transformer.build_model("JiT-B/16", 256, 1000, condition_channels=channels)
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert f"{count:.1f} M weights" in planned(capsys, *how, *flags)[1]
    assert planned(capsys, *how, "--condition_from", "blur:2.0", "--path", "bridge")[0] == 0
    beside = planned(capsys, *how, "--condition_path", "folder", "--condition_inject", "tokens")[1]
    assert "50.9 G multiply-adds" in beside  # a block sees the picture's tokens, too: 25.2 G without


def test_what_fits_nowhere_is_said_with_a_remedy(capsys):
    code, out, _ = planned(capsys, "--model", "JiT-G/8", "--img_size", "512", "--gpu", "L4", "--num_gpus", "1")
    assert code == 1
    assert "Nothing fits" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "H10"], "Did you mean 'H100'?"),
        (["--gpu", "H100", "--num_gpus", "7", "--nodes", "2"], "--num_gpus 7: must be"),
        (["--gpu", "H100", "--global_batch_size", "100", "--num_gpus", "8"], "--global_batch_size 100: must be"),
        (["--gpu", "H100", "--batch_sice", "3"], "Did you mean '--batch_size'?"),
        (["--gpu", "H100", "--peak_share", "2"], "--peak_share 2: must be"),
        (["--gpu", "H100", "--init_from", "x", "--lora_rank", "4"], "--init_from x: all weights"),
    ],
)
def test_wrong_questions_are_answered_with_a_remedy(capsys, flags, words):
    assert main(flags) == 2
    assert words in capsys.readouterr().err
