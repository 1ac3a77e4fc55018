"""The tests as a second tutorial, in the order of fire_opd.py, each named as a sentence.

The first part shows the method: formulas against examples worked by hand, naive float64 loops,
enumeration and finite differences. Offline, on a CPU; the tests of a GPU come last and skip
themselves where there is none.

    python -m pytest -q                   # all of them, under two minutes
    python -m pytest -q -m "not slow"     # the tutorial, in some seconds
"""

import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing import forkserver
from pathlib import Path
from xml.etree import ElementTree

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import fire_opd as f

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # as the program does for its own process
transformers.logging.disable_progress_bar()
FILE = Path(f.__file__).resolve()
HERE = FILE.parent
CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE)}
GPU = f.DEVICE == "cuda"
f.DEVICE = "cpu"  # until the last section, which turns to the GPU
slow = pytest.mark.slow  # starts processes, or tries many models

# --- What the tests share: a random pair as checkpoint folders, and runs on it -------------------

SMALL = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
    "eos_token_id": 14, "pad_token_id": 13, "bos_token_id": None}


def save_model(folder, seed, **changes):
    """A random Qwen3 with the tiny tokenizer: 20 embedding rows for 16 tokens, as real ones pad."""
    torch.manual_seed(seed)
    settings = SMALL | {"head_dim": 16, "tie_word_embeddings": True} | changes
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    model.save_pretrained(folder)
    f.tiny_tokenizer().save_pretrained(folder)
    return model


def write_rows(path, rows):
    """A JSON Lines file. -> its path as text"""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A folder with a random student, two random teachers and prompts for one teacher or both."""
    root = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("student", "teacher", "other")):
        save_model(root / name, seed)
    rng = np.random.default_rng(0)
    rows, routed = [], []
    for i in range(40):
        digits = rng.integers(0, 10, rng.integers(3, 9))
        prompt = "".join(map(str, digits)) + "+="
        rows.append({"prompt": prompt, "answer": "12", "domain": "ab"[i % 2]})
        routed.append(rows[-1] | {"teacher": ("one", "two")[i % 2]})
    write_rows(root / "prompts.jsonl", rows)
    write_rows(root / "routed.jsonl", routed)
    return root


def flags(pair, out, **changes):
    """The command line of a short run on the pair."""
    settings = {
        "teacher": pair / "teacher", "student": pair / "student",
        "prompts": pair / "prompts.jsonl", "output_dir": out, "steps": 3, "batch_size": 6,
        "max_new_tokens": 10, "lr": 1e-2, "dtype": "float32"} | changes
    argv = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        else:
            argv += [flag, str(value)]
    return argv


def loaded(pair, out, **changes):
    """A Run that is ready to step, in this process."""
    config = f.parse_config(flags(pair, out, **changes))
    f.start_ranks(config)
    return f.load(config)


def log_of(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in open(Path(folder, "metrics.jsonl"))]


def assert_same_metrics(a, b, **tolerance):
    """Two logs agree in everything but times and memory."""
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert left.keys() == right.keys()
        for name in left:
            if name.startswith(("seconds", "tokens_per", "peak")):
                continue
            if left[name] != right[name]:
                assert left[name] == pytest.approx(right[name], **tolerance), (left["step"], name)


def weights_of(folder):
    """The weights of a run's newest checkpoint. -> {name: tensor}"""
    return load_file(f.checkpoints(folder)[-1] / "model.safetensors")


def moments_of(folder):
    """The optimizer's state in a run's newest checkpoint. -> {name: {"exp_avg": ...}}"""
    return torch.load(f.checkpoints(folder)[-1] / "optimizer.pt", weights_only=True)["state"]


def assert_equal(a, b):
    """Two dicts of tensors agree to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def graded_step(run):
    """A step of train_step up to its update, which is left out. -> Graded"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f, "update", lambda *args: {})
        graded, metrics = f.train_step(run)
    return graded


def update(run, graded):
    """The update that train_step makes of it. -> metrics"""
    return f.update(
        run, graded.rollouts, graded.teacher_log_probs, graded.keep, graded.weights)


def gradient(run, graded):
    """The gradient of a step as the optimizer gets it, which only notes it; and the metrics."""
    gradients = {}

    def note():
        for name, parameter in run.student.named_parameters():
            gradients[name] = parameter.grad.clone()

    run.optimizer.step = note
    metrics = update(run, graded)
    return gradients, metrics


def responses_of(rollouts):
    """The response tokens of each row."""
    return [ids[mask].tolist() for ids, mask in zip(rollouts.ids, rollouts.mask)]


def child(argv, log, rank, ranks, port):
    """What a process of `start` does: the command, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": str(ranks)}
    f.RANK, f.WORLD_SIZE, f.LOCAL_RANK = rank, ranks, rank
    if "--compile" in argv:  # without a C++ compiler, which would take a minute
        torch.compile = functools.partial(torch.compile, backend="eager")
    # After a fork torch makes its pool of threads anew, and fails if two threads ask at once.
    torch.set_num_threads(1)
    sys.argv = [str(FILE), *argv]
    f.run_as_script()


@pytest.fixture(scope="session")
def start():
    """start(argv, log, ranks) -> processes. They are forked from a server that has imported all
    this but has not computed anything: importing torch for each would take longer than most runs,
    and a process that has used autograd beside a GPU cannot be forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_fire_opd"])
    with pytest.MonkeyPatch.context() as patch:  # the server and its children see no GPU
        for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH"):
            patch.setenv(name, CPU[name])
        forkserver.ensure_running()

    def start(argv, log, ranks=1):
        port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
        processes = []
        with pytest.MonkeyPatch.context() as patch:  # they need not import what started pytest
            patch.delattr(sys.modules["__main__"], "__file__", raising=False)
            for rank in range(ranks):
                arguments = (argv, str(log), rank, ranks, port)
                processes.append(context.Process(target=child, args=arguments))
                processes[-1].start()
        return processes

    return start


def end(processes, log):
    """Wait for processes. -> the set of their exit codes, and what they wrote"""
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return {process.exitcode for process in processes}, Path(log).read_text()

# --- The method ----------------------------------------------------------------------------------

assert_close = torch.testing.assert_close


def assert_nearly_equal(a, b):
    """But for the rounding of float32."""
    assert_close(a, b, rtol=1e-4, atol=1e-5)


def random_uniforms(rows, width, seed=0):
    """Numbers in [0, 1), float64 [rows, width]."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.random((rows, width)))


def random_responses(seed):
    """Five rows of nine places: row 0 is empty, row 1 has a single token.
    -> their mask, and two tables of numbers in [0, 1), such as entropies"""
    lengths = torch.tensor(np.random.default_rng(seed).integers(1, 10, 5))
    lengths[0] = 0
    lengths[1] = 1
    mask = torch.arange(9) < lengths[:, None]
    first = random_uniforms(5, 9, seed + 100)
    second = random_uniforms(5, 9, seed + 200)
    return mask, first, second


@pytest.mark.parametrize("tokens,length", [
    ([5, 5, 2, 2, 2], 3),  # the end belongs to the response, the padding does not: here both are 2
    ([5, 3, 5, 2, 2], 2),  # several ids may end it
    ([2, 2, 2, 5, 5], 1),
    ([5, 5, 5, 5, 5], 5),  # it was cut off
])
def test_the_response_mask_ends_with_the_first_end_of_sequence(tokens, length):
    mask = f.mask_responses(torch.tensor([tokens]), {2, 3})
    expected = torch.arange(5) < length
    assert torch.equal(mask, expected[None])


def test_without_an_end_of_sequence_every_token_is_response():
    tokens = torch.tensor([[1, 2, 3]])
    assert f.mask_responses(tokens, set()).all()


def test_the_score_is_the_mean_teacher_log_prob_of_the_response():
    log_probs = torch.tensor([
        [-1.0, -3.0, -99.0],
        [-2.0, math.nan, math.nan],
        [5.0, 5.0, 5.0]])
    mask = torch.tensor([
        [1, 1, 0],  # (-1 - 3) / 2
        [1, 0, 0],  # -2 / 1
        [0, 0, 0]])  # 0 / 0
    scores = f.trajectory_scores(log_probs, mask)
    assert scores.tolist() == [-2.0, -2.0, -math.inf]


def test_a_nan_in_the_response_makes_the_score_nan():
    log_probs = torch.tensor([[-1.0, math.nan]])
    scores = f.trajectory_scores(log_probs, torch.ones(1, 2))
    assert scores.isnan().all()


@pytest.mark.parametrize("given,dtype", [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
])
def test_scores_are_summed_in_float32_at_least(given, dtype):
    log_probs = torch.full((1, 1000), -1.001, dtype=given)
    scores = f.trajectory_scores(log_probs, torch.ones(1, 1000))
    assert scores.dtype == dtype
    assert_close(scores, log_probs[:, 0].to(dtype), rtol=1e-6, atol=0)


def test_the_filter_drops_the_lowest_fifth():
    keep = f.filter_trajectories(torch.arange(10.0), 20)  # the quantile, interpolated, is 1.8
    assert keep.tolist() == [False] * 2 + [True] * 8


@pytest.mark.parametrize("seed", range(20))
def test_the_filter_threshold_is_numpys_quantile_of_the_finite_scores(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=rng.integers(1, 40))
    broken = rng.random(len(scores)) < 0.2
    scores[broken] = rng.choice([np.nan, -np.inf])
    percentile = float(rng.uniform(0, 100))
    expected = np.isfinite(scores)
    if expected.any():
        expected &= scores >= np.quantile(scores[expected], percentile / 100)
    keep = f.filter_trajectories(torch.tensor(scores), percentile)
    assert keep.tolist() == expected.tolist()


@pytest.mark.parametrize("scores,percentile,expected", [
    ([1.0, 1.0, 1.0, 2.0], 50, [True, True, True, True]),  # ties with the threshold stay
    ([3.0, 2.0, 3.0], 100, [True, False, True]),
    ([-7.0], 20, [True]),  # a quantile of one number is that number
    ([-7.0], 100, [True]),
    ([3.0, -math.inf, math.nan, 1.0], 0, [True, False, False, True]),
    ([3.0, math.inf, 1.0], 0, [True, False, True]),
    ([math.nan, -math.inf], 20, [False, False]),
    ([], 20, []),
    ([1.0, 1.0 + 2**-23], 40, [False, True]),  # neighbouring floats: float64 is between them
])
def test_the_filter_keeps_ties_and_never_what_has_no_score(scores, percentile, expected):
    assert f.filter_trajectories(torch.tensor(scores), percentile).tolist() == expected


@pytest.mark.parametrize("percentile", [5, 7, 14, 20, 28, 35, 55, 56, 68, 70])
def test_a_score_that_is_the_quantile_is_kept(percentile):
    """Where the quantile is a score, no rounding of the interpolation may lift it above that."""
    cases = 0
    for n in range(2, 110):
        scores = torch.arange(n, dtype=torch.float64).sin()
        rank, rest = divmod(percentile * (n - 1), 100)
        if rest == 0:
            cases += 1
            assert f.filter_trajectories(scores, percentile).sum() == n - rank
    assert cases > 0


def test_a_rounded_percentile_does_not_lift_the_quantile():
    scores = torch.arange(1001, dtype=torch.float64)
    assert 16.1 * 1000 / 100 > 161  # in floats
    assert f.filter_trajectories(scores, 16.1).sum() == 1001 - 161


@pytest.mark.parametrize("percentile", [-1, 100.1, math.nan])
def test_a_percentile_out_of_bounds_is_an_error(percentile):
    with pytest.raises(ValueError, match="percentile"):
        f.filter_trajectories(torch.zeros(3), percentile)


def test_the_weights_of_three_tokens_worked_by_hand():
    teacher_entropy = torch.tensor([[0.0, 1.0, 2.0]])  # sure to unsure: c = 1 - H / 2 = 1, 1/2, 0
    student_entropy = torch.tensor([[2.0, 1.0, 0.0]])  # unsure to sure: u = H / 2 = 1, 1/2, 0
    # (1 + c) (1 + u) = 2 * 2, 3/2 * 3/2, 1 * 1 = 4, 9/4, 1, of which the mean is 29/12
    weights = f.token_weights(teacher_entropy, student_entropy, torch.ones(1, 3))
    products = torch.tensor([[4.0, 9 / 4, 1.0]])
    assert_close(weights, products / (29 / 12))


def naive_weights(teacher_entropy, student_entropy, alpha=1, beta=1):
    """The formula for the tokens of one trajectory, in Python floats."""
    teacher_entropy = teacher_entropy.tolist()
    student_entropy = student_entropy.tolist()
    products = []
    for h_t, h_s in zip(teacher_entropy, student_entropy):
        confidence = 1 - h_t / max(teacher_entropy)
        confusion = h_s / max(student_entropy)
        products.append((1 + alpha * confidence) * (1 + beta * confusion))
    mean = sum(products) / len(products)
    return [product / mean for product in products]


@pytest.mark.parametrize("seed", range(12))
def test_weights_are_the_formula_with_mean_one_in_each_trajectory(seed):
    mask, teacher, student = random_responses(seed)
    alpha, beta = np.random.default_rng(seed).uniform(0, 3, 2)
    weights = f.token_weights(teacher, student, mask, alpha, beta)
    for i in range(1, len(mask)):
        own = mask[i]
        expected = naive_weights(teacher[i, own], student[i, own], alpha, beta)
        assert weights[i, own].tolist() == pytest.approx(expected)
        assert weights[i, own].mean().item() == pytest.approx(1)
    assert not weights[~mask].any()


@pytest.mark.parametrize("seed", range(12))
def test_weights_in_float32_are_those_of_float64(seed):
    mask, teacher, student = random_responses(seed)
    exact = f.token_weights(teacher, student, mask)
    rounded = f.token_weights(teacher.float(), student.float(), mask)
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_weights_do_not_depend_on_the_order_of_the_tokens(seed):
    mask, teacher, student = random_responses(seed)
    weights = f.token_weights(teacher, student, mask)
    backwards = f.token_weights(teacher.flip(1), student.flip(1), mask.flip(1))
    assert_close(backwards.flip(1), weights)


@pytest.mark.parametrize("seed", range(12))
def test_in_batch_scope_all_valid_tokens_are_one_trajectory(seed):
    mask, teacher, student = random_responses(seed)
    weights = f.token_weights(teacher, student, mask, scope="batch")
    expected = naive_weights(teacher[mask], student[mask])
    assert weights[mask].tolist() == pytest.approx(expected)
    assert not weights[~mask].any()


RISING = torch.linspace(0, 2, 7)[None]
FLAT = torch.ones(1, 7)
ALL_SEVEN = torch.ones(1, 7)


def test_weights_fall_with_the_hesitation_of_the_teacher():
    weights = f.token_weights(RISING, FLAT, ALL_SEVEN)
    assert (weights.diff() < 0).all()


def test_weights_rise_with_the_hesitation_of_the_student():
    weights = f.token_weights(FLAT, RISING, ALL_SEVEN)
    assert (weights.diff() > 0).all()


def test_without_alpha_and_beta_all_weights_are_one():
    weights = f.token_weights(RISING, RISING, ALL_SEVEN, alpha=0.0, beta=0.0)
    assert (weights == 1).all()


def test_where_all_entropies_are_zero_all_weights_are_one():
    nothing = torch.zeros(1, 7)
    weights = f.token_weights(nothing, nothing, ALL_SEVEN)
    assert (weights == 1).all()


def test_weights_do_not_see_what_is_off_the_mask():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    junk = torch.tensor([
        [0.0, 0.0, math.nan],
        [math.nan, math.inf, 1.0]])
    weights = f.token_weights(junk, junk, mask)
    assert torch.equal(weights, mask.float())


def test_weights_have_no_gradient():
    entropy = RISING.clone().requires_grad_(True)
    weights = f.token_weights(entropy, entropy, ALL_SEVEN)
    assert not weights.requires_grad


def test_a_scope_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="scope"):
        f.token_weights(RISING, RISING, ALL_SEVEN, scope="token")


# Two tokens: the teacher likes the first better than the student did and the second less.
OLD = torch.tensor([[-2.0, -1.0]])
TEACHER = torch.tensor([[-1.0, -3.0]])  # A = 1, -2
WEIGHTS = torch.tensor([[1.5, 0.5]])  # w A = 3/2, -1
BOTH = torch.ones(1, 2)


@pytest.mark.parametrize("ratio,objective", [
    (1, 1.5 - 1),  # of the policy that wrote: the weighted advantages
    (2, 1.2 * 1.5 - 2 * 1),  # what is praised gains only up to 1.2, what is blamed pays in full
    (0.5, 0.5 * 1.5 - 0.8 * 1),  # and the other way round, at 0.8
])
def test_the_loss_of_two_tokens_worked_by_hand(ratio, objective):
    new = OLD + math.log(ratio)
    loss = f.policy_loss(new, OLD, TEACHER, WEIGHTS, BOTH, num_tokens=2)
    assert loss.item() == pytest.approx(-objective / 2)


def test_the_gradient_is_minus_the_weighted_advantage_also_where_old_is_this_very_pass():
    new = OLD.clone().requires_grad_(True)
    loss = f.policy_loss(new, new, TEACHER, WEIGHTS, BOTH, num_tokens=2)
    loss.backward()
    assert new.grad.tolist() == [[-1.5 / 2, 1 / 2]]


def random_losses(seed):
    """What a policy_loss needs: log_probs of a policy that has moved, old, teacher, weights and
    mask."""
    mask, weights, noise = random_responses(seed)
    old = -3 * random_uniforms(5, 9, seed + 300)
    teacher = -3 * random_uniforms(5, 9, seed + 400)
    new = old + 0.6 * (noise - 0.5)  # ratios from 0.74 to 1.35
    return new.requires_grad_(True), old, teacher, weights, mask


@pytest.mark.parametrize("seed", range(8))
def test_the_loss_is_the_clipped_objective_token_by_token(seed):
    new, old, teacher, weights, mask = random_losses(seed)
    expected = 0
    for b, t in mask.nonzero():
        advantage = teacher[b, t] - old[b, t]
        weighted = weights[b, t].item() * advantage.item()
        ratio = (new[b, t] - old[b, t]).exp().item()
        clipped = min(max(ratio, 0.8), 1.2)
        expected -= min(ratio * weighted, clipped * weighted) / 17
    loss = f.policy_loss(new, old, teacher, weights, mask, 17, clip_ratio=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_gradient_of_the_loss_is_that_of_finite_differences(seed):
    new, old, teacher, weights, mask = random_losses(seed)

    def loss_at(log_probs):
        return f.policy_loss(log_probs, old, teacher, weights, mask, 17)

    loss_at(new).backward()
    here = new.detach()
    slopes = torch.zeros_like(old)
    for b, t in mask.nonzero():
        step = torch.zeros_like(old)
        step[b, t] = 1e-6
        rise = loss_at(here + step) - loss_at(here - step)
        slopes[b, t] = rise / 2e-6
    assert_close(new.grad, slopes, rtol=1e-6, atol=1e-7)
    assert not new.grad[~mask].any()


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step():
    tables = random_losses(0)
    whole = f.policy_loss(*tables, num_tokens=17)
    parts = 0
    for rows in ([0, 3], [1], [2, 4]):
        of_rows = [table[rows] for table in tables]
        parts += f.policy_loss(*of_rows, num_tokens=17)
    assert_close(parts, whole)


def test_infinities_off_the_mask_leave_loss_and_gradient_finite():
    new = torch.tensor([[-1.0, math.inf, math.nan]], requires_grad=True)
    old = torch.tensor([[-1.0, -math.inf, 0.0]])
    teacher = torch.tensor([[-2.0, math.nan, math.inf]])
    weights = torch.tensor([[1.0, math.inf, math.nan]])
    mask = torch.tensor([[1, 0, 0]])
    loss = f.policy_loss(new, old, teacher, weights, mask, num_tokens=1)
    loss.backward()
    assert loss.item() == 1
    assert new.grad.tolist() == [[1, 0, 0]]


def test_the_expected_gradient_of_the_loss_is_that_of_the_reverse_kl():
    """All 16 responses of two tokens from a vocabulary of four, each weighed by its probability."""
    torch.manual_seed(0)
    # Row 0 has the logits of the first token, row 1 + y those of the second one after a y.
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    log_s = student.log_softmax(1)
    log_t = teacher.log_softmax(1)
    estimate = 0
    for first, second in itertools.product(range(4), repeat=2):
        contexts = [0, 1 + first]
        s = log_s[contexts, [first, second]][None]
        t = log_t[contexts, [first, second]][None]
        probability = s.sum().exp().detach()
        loss = f.policy_loss(s, s.detach(), t, BOTH, BOTH, num_tokens=1)
        estimate += probability * loss
    # The divergence of each context; how probable the contexts themselves are is held fixed.
    divergence = (log_s.exp() * (log_s - log_t)).sum(1)
    first_probs = log_s[0].exp().detach()
    exact = divergence[0] + first_probs @ divergence[1:]
    assert estimate.item() == pytest.approx(exact.item())
    got = torch.autograd.grad(estimate, student, retain_graph=True)
    wanted = torch.autograd.grad(exact, student)
    assert_close(got, wanted)


def small_head():
    """Seven tokens of width 5 before a head of eleven, in float64. -> hidden, weight, targets"""
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, 11, (7,))


CHUNKS = [(1, 1.0), (3, 0.7), (128, 1.9), (None, 1.0)]


def entropy_of(table):
    """Of each row of log-probs. [T, V] -> [T]"""
    return -(table.exp() * table).sum(1)


def picked(table, tokens):
    """The log-prob of each row's token. [T, V], T tokens -> [T]"""
    return table[range(len(tokens)), tokens]


def naive_log_probs(hidden, weight, targets, temperature=1.0):
    """From whole logits. -> log pi(targets), and the table of all log-probs"""
    table = (hidden @ weight.T / temperature).log_softmax(1)
    return picked(table, targets), table


@pytest.mark.parametrize("chunk,temperature", CHUNKS)
def test_log_probs_and_entropy_in_chunks_are_those_of_whole_logits(chunk, temperature):
    hidden, weight, targets = small_head()
    log_probs, entropy = f.token_log_probs_and_entropy(
        hidden, weight, targets, temperature, chunk)
    expected, table = naive_log_probs(hidden, weight, targets, temperature)
    assert_close(log_probs, expected)
    assert_close(entropy, entropy_of(table))
    assert not entropy.requires_grad
    upstream = torch.randn(7, dtype=torch.float64)
    got = torch.autograd.grad(log_probs @ upstream, (hidden, weight))
    wanted = torch.autograd.grad(expected @ upstream, (hidden, weight))
    assert_close(got, wanted)


@pytest.mark.parametrize("chunk,temperature", CHUNKS)
def test_the_gradient_of_log_probs_is_that_of_finite_differences(chunk, temperature):
    hidden, weight, targets = small_head()

    def log_probs(hidden, weight):
        return f.token_log_probs_and_entropy(hidden, weight, targets, temperature, chunk)[0]

    assert torch.autograd.gradcheck(log_probs, (hidden, weight))


def test_a_bias_is_divided_by_the_temperature_too_and_may_rule_tokens_out():
    hidden, weight, targets = small_head()
    bias = torch.randn(11, dtype=torch.float64)
    ruled_out = next(i for i in range(11) if i not in targets)
    bias[ruled_out] = -math.inf
    bias.requires_grad_(True)
    log_probs, entropy = f.token_log_probs_and_entropy(
        hidden, weight, targets, 0.7, chunk=3, bias=bias)
    others = [i for i in range(11) if i != ruled_out]
    logits = (hidden @ weight.T + bias) / 0.7
    table = logits[:, others].log_softmax(1)
    expected = picked(table, [others.index(y) for y in targets])
    assert_close(log_probs, expected)
    assert_close(entropy, entropy_of(table))
    inputs = (hidden, weight, bias)
    got = torch.autograd.grad(log_probs.sum(), inputs)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    assert_close(got, wanted)


def test_entropy_that_is_not_wanted_is_zero_and_changes_no_log_prob():
    hidden, weight, targets = small_head()
    log_probs, _ = f.token_log_probs_and_entropy(hidden, weight, targets)
    same, entropy = f.token_log_probs_and_entropy(hidden, weight, targets, with_entropy=False)
    assert torch.equal(log_probs, same)
    assert entropy.tolist() == [0] * 7


def test_log_probs_in_float32_are_those_of_float64():
    hidden, weight, targets = small_head()
    exact, _ = f.token_log_probs_and_entropy(hidden, weight, targets)
    rounded, _ = f.token_log_probs_and_entropy(hidden.float(), weight.float(), targets)
    assert exact.dtype == torch.float64
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)


def test_log_probs_of_a_bfloat16_model_are_float32():
    hidden, weight, targets = small_head()
    log_probs, entropy = f.token_log_probs_and_entropy(
        hidden.bfloat16(), weight.bfloat16(), targets)
    assert log_probs.dtype == torch.float32
    assert entropy.dtype == torch.float32


def test_under_autocast_only_the_products_are_rounded():
    torch.manual_seed(0)
    hidden = torch.randn(9, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (9,))
    gradients = {}
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            log_probs, entropy = f.token_log_probs_and_entropy(hidden, weight, targets, 0.8, 4)
        assert log_probs.dtype == torch.float32  # a softmax in bf16 would be off by per cents
        assert entropy.dtype == torch.float32
        total = log_probs.sum()
        gradients[bf16] = torch.autograd.grad(total, (hidden, weight))
    for exact, rounded in zip(gradients[False], gradients[True]):
        assert rounded.dtype == torch.float32
        assert 0 < (exact - rounded).norm() < 0.02 * exact.norm()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        results = function(*args, **kwargs)
        for result in torch.utils._pytree.tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("chunk,chunk_length", [(4, 4), (None, 128)])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_whole(chunk, chunk_length):
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    with LargestTensor() as largest:
        log_probs, _ = f.token_log_probs_and_entropy(hidden, weight, targets, 1.0, chunk)
        log_probs.sum().backward()
    assert largest.elements <= max(chunk_length * 1000, weight.numel())
    assert largest.elements < 512 * 1000


def kept_for_backward(function, *args):
    """How many numbers a forward pass keeps for its backward pass."""
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, torch.Tensor.detach):
        function(*args)
    return sum(sizes)


def test_no_logits_are_kept_for_the_backward_pass():
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    kept = kept_for_backward(f.token_log_probs_and_entropy, hidden, weight, targets)
    assert kept < 512 * 1000 / 10  # most of it the weight, once for each of four chunks
    naive = kept_for_backward(naive_log_probs, hidden, weight, targets)
    assert naive > 512 * 1000


def chi_squared(tokens, probabilities):
    """How far the counts of drawn tokens are from those that their probabilities promise."""
    expected = len(tokens) * probabilities
    counts = torch.bincount(tokens, minlength=len(probabilities))
    return ((counts - expected) ** 2 / expected).sum().item()


def test_sampling_follows_the_softmax():
    torch.manual_seed(0)
    logits = 2 * torch.randn(12)
    uniforms = random_uniforms(20000, 1)[:, 0]
    tokens, log_probs, entropy = f.sample_tokens(
        logits.expand(20000, -1), uniforms, temperature=0.8)
    log_p = (logits / 0.8).log_softmax(0)
    # 11 degrees of freedom: 99.9 % of draws are nearer.
    assert chi_squared(tokens, log_p.exp()) < 31.3
    assert_close(log_probs, log_p[tokens])
    assert_close(entropy, entropy_of(log_p[None]).expand(20000))


def test_a_uniform_picks_the_first_token_whose_cumulative_probability_exceeds_it():
    p = torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5, 0.0])
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999])
    logits = p.log().expand(6, -1)
    tokens, log_probs, entropy = f.sample_tokens(logits, uniforms)
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4]
    assert_close(log_probs.exp(), p[tokens])
    assert_close(entropy / math.log(2), torch.full((6,), 1.5))  # one bit and a half


def test_sampling_at_the_ends_of_the_unit_interval_gives_tokens_that_exist():
    logits = torch.full((3, 151936), -20.0)
    logits[:, 0] = -math.inf
    logits[:, -1] = -math.inf
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, log_probs, _ = f.sample_tokens(logits, uniforms)
    assert tokens[0] == 1
    assert tokens[2] == 151934
    assert log_probs.isfinite().all()


def test_a_token_that_takes_all_probability_but_a_rounding_is_drawn():
    logits = torch.tensor([[0.0, 50.0, -math.inf]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    tokens, _, _ = f.sample_tokens(logits, almost_one)
    assert tokens.item() == 1


def test_sampling_from_nan_gives_nan_and_does_not_crash():
    logits = torch.full((1, 4), math.nan)
    tokens, log_probs, _ = f.sample_tokens(logits, torch.tensor([0.5]))
    assert 0 <= tokens.item() < 4  # on a GPU a token that does not exist would end the process
    assert log_probs.isnan().all()  # and this tells


def test_sampling_scales_uniforms_by_the_end_of_the_sum():
    torch.manual_seed(0)
    logits = torch.randn(5000)
    cdf = logits.softmax(0).cumsum(0, dtype=torch.float64)
    assert cdf[-1] != 1  # they are sums of float32 probabilities
    exact = cdf / cdf[-1]
    uniforms = ((cdf + exact) / 2)[2000:4000]  # each between an edge of the sum and a true one
    tokens, _, _ = f.sample_tokens(logits.expand(2000, -1), uniforms)
    expected = torch.searchsorted(exact, uniforms, right=True)
    assert torch.equal(tokens, expected)


def test_random_scores_are_noise_where_there_is_a_score():
    scores = torch.tensor([5.0, 4.0, -math.inf, math.nan, 1.0, 2.0])
    noise = torch.tensor([0.1, 0.9, 0.0, 1.0, 0.5, 0.7])
    ranked = f.random_scores(scores, noise)
    finite = [0, 1, 4, 5]
    assert torch.equal(ranked[finite], noise[finite])
    assert ranked[[2, 3]].isnan().all()
    # The quartile of 0.1, 0.5, 0.7 and 0.9 is 0.4: the likeliest row goes.
    keep = f.filter_trajectories(ranked, 25)
    assert keep.tolist() == [False, True, False, False, True, True]


@pytest.mark.parametrize("seed", range(12))
def test_the_random_filter_drops_as_many_as_the_filter(seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=30))
    scores[rng.random(30) < 0.1] = math.nan
    noise = torch.tensor(rng.random(30))
    percentile = float(rng.uniform(10, 90))
    keep = f.filter_trajectories(scores, percentile)
    at_random = f.filter_trajectories(f.random_scores(scores, noise), percentile)
    assert at_random.sum() == keep.sum()
    assert not torch.equal(at_random, keep)


@pytest.mark.parametrize("weights,expected", [
    ([3.0, 1.0, 2.0, 0.0], [1.5, 0, 1.5, 0]),  # two tokens share the 3 of three
    ([1.0, 3.0, 2.0, 4.0], [0, 2, 0, 2]),
    ([1.0, 1.0, 1.0, 1.0], [2, 2, 0, 0]),  # of what is alike, what comes first
    ([0.0, 0.0, 1.2, 0.8], [0, 0, 2, 0]),  # a response stands behind its prompt
    ([0.5, 0.0, 0.0, 0.0], [1, 0, 0, 0]),
    ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
])
def test_hard_weights_are_the_heavier_half_all_alike(weights, expected):
    weights = torch.tensor([weights])
    hard = f.hard_weights(weights, weights > 0)
    assert hard.tolist() == [expected]


@pytest.mark.parametrize("seed", range(12))
def test_hard_weights_have_mean_one_and_come_from_the_heaviest_tokens(seed):
    mask, teacher, student = random_responses(seed)
    soft = f.token_weights(teacher, student, mask)
    hard = f.hard_weights(soft, mask)
    assert not hard[~mask].any()
    for i in range(1, len(mask)):
        n = int(mask[i].sum())
        chosen = hard[i] > 0
        left_out = mask[i] & ~chosen
        assert chosen.sum() == math.ceil(n / 2)
        assert len(hard[i, chosen].unique()) == 1
        assert hard[i].sum().item() == pytest.approx(n)
        if n > 1:
            assert soft[i, chosen].min() >= soft[i, left_out].max()


# --- Policies ------------------------------------------------------------------------------------

KEY = (0, f.SAMPLE, 0)  # of the uniforms of a rollout: seed, purpose, step


def ids_of(run, count):
    """The ids of the first prompts, which are of several lengths."""
    return [prompt.ids for prompt in run.prompts[:count]]


def table_of(model, prompt, response, temperature=1.0):
    """log pi(. | all before) at each token of a response, from whole logits. -> [T, 16]"""
    logits = model(torch.tensor([prompt + response])).logits[0]
    logits = logits[len(prompt) - 1:-1, :16]  # position t - 1 predicts token t
    return (logits / temperature).log_softmax(1)


@pytest.fixture
def hostile(pair, tmp_path):
    """The student, with a generation config that bends its distribution in every way."""
    folder = tmp_path / "hostile"
    shutil.copytree(pair / "student", folder)
    bent = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.3, temperature=0.2, repetition_penalty=3.0,
        no_repeat_ngram_size=1, suppress_tokens=[1, 2], eos_token_id=15)
    bent.save_pretrained(folder)
    return folder


def test_a_hostile_generation_config_does_not_change_what_is_sampled(pair, tmp_path, hostile):
    run = loaded(pair, tmp_path / "out", student=hostile, temperature=1.3)
    prompt = run.prompts[0].ids
    uniforms = random_uniforms(8000, 1, seed=1)
    tokens, log_probs, _ = run.student.sample([prompt] * 8000, uniforms)
    with torch.no_grad():
        log_p = table_of(run.student.model, prompt, [0], 1.3)[0]
    assert tokens.max() < 16  # the four padded rows are never sampled
    assert chi_squared(tokens[:, 0], log_p.exp()) < 37.7  # 15 degrees of freedom, 99.9 %
    assert_nearly_equal(log_probs, log_p[tokens])


def test_a_checkpoint_keeps_its_generation_config_but_for_the_ends_of_rollouts(
        pair, tmp_path, hostile):
    run = loaded(pair, tmp_path / "out", student=hostile)
    assert run.student.eos_ids == {14, 15}  # of the model's configuration, and of the other
    f.save_checkpoint(run)
    before = json.loads((hostile / "generation_config.json").read_text())
    folder = f.checkpoints(tmp_path / "out")[0]
    after = json.loads((folder / "generation_config.json").read_text())
    assert after == before | {"eos_token_id": [14, 15]}
    assert GenerationConfig.from_pretrained(folder).top_k == 2


def test_rollouts_depend_neither_on_segments_nor_on_batches_nor_on_padding(
        pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", max_new_tokens=20)
    whole = f.rollout(run, run.prompts[:12], KEY)
    lengths = whole.mask.sum(1).tolist()
    assert len(set(lengths)) > 4  # some end early, some late
    run.config.rollout_batch_size = 5
    monkeypatch.setattr(f.Policy, "segment", 3)
    parts = f.rollout(run, run.prompts[:12], KEY)
    assert torch.equal(whole.mask, parts.mask)
    assert torch.equal(whole.ids, parts.ids)
    assert_nearly_equal(whole.log_probs, parts.log_probs)
    assert_nearly_equal(whole.student_entropy, parts.student_entropy)


def test_log_probs_and_entropies_of_rollouts_are_those_of_whole_logits(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", max_new_tokens=20, temperature=0.7)
    rollouts = f.rollout(run, run.prompts[:12], KEY)
    model = copy.deepcopy(run.student.model).double()
    for i, response in enumerate(responses_of(rollouts)):
        prompt = rollouts.prompts[i].ids
        with torch.no_grad():
            table = table_of(model, prompt, response, 0.7).float()
        own = rollouts.mask[i]
        assert_nearly_equal(rollouts.log_probs[i, own], picked(table, response))
        assert_nearly_equal(rollouts.student_entropy[i, own], entropy_of(table))


def test_a_response_ends_with_its_end_of_sequence_or_at_the_longest(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", max_new_tokens=20)
    rollouts = f.rollout(run, run.prompts[:12], KEY)
    responses = responses_of(rollouts)
    ended = [response for response in responses if 14 in response]
    cut_off = [response for response in responses if 14 not in response]
    assert ended
    for response in ended:
        assert response.index(14) == len(response) - 1
    assert cut_off
    for response in cut_off:
        assert len(response) == 20


def test_finished_rows_leave_the_batch(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", max_new_tokens=20)
    monkeypatch.setattr(f.Policy, "segment", 2)
    forward = run.student.model.forward
    rows = []

    def counted(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(run.student.model, "forward", counted)
    rollouts = f.rollout(run, run.prompts[:12], KEY)
    lengths = rollouts.mask.sum(1)
    assert rows[0] == 12
    # A row leaves at the first look after its end, at most a token later.
    assert sum(rows) <= (lengths + 1).sum()
    assert sum(rows) < 12 * lengths.max()


class CacheWithoutRoom(f.RolloutCache):
    """As for models that allow no room: transformers' own layers and mask."""

    def __init__(self, model, position):
        super().__init__(model, position)
        self.roomy = False
        self.layers = transformers.DynamicCache(config=model.config).layers


@pytest.mark.parametrize("segment", [1, 4, 64])
def test_a_cache_with_room_draws_the_same_tokens_as_transformers_own(
        pair, tmp_path, monkeypatch, segment):
    run = loaded(pair, tmp_path / "out")
    run.student.segment = segment
    uniforms = random_uniforms(6, 30)
    ours, our_log_probs, _ = run.student.sample(ids_of(run, 6), uniforms)
    monkeypatch.setattr(f, "RolloutCache", CacheWithoutRoom)
    theirs, their_log_probs, _ = run.student.sample(ids_of(run, 6), uniforms)
    valid = f.mask_responses(ours, run.student.eos_ids)
    assert valid.sum() > 20
    assert torch.equal(ours[valid], theirs[valid])
    assert torch.allclose(our_log_probs[valid], their_log_probs[valid], atol=1e-5)


class Float32Layer(f.RoomyLayer):
    """A cache that keeps whatever it is given in float32."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.float(), values.float())


def test_a_cache_in_bfloat16_draws_the_same_as_one_in_float32_to_the_bit(
        pair, tmp_path, monkeypatch):
    """Attention rounds keys and values to bfloat16 anyway."""
    run = loaded(pair, tmp_path / "out", dtype="bfloat16")
    uniforms = random_uniforms(6, 30)
    drawn = run.student.sample(ids_of(run, 6), uniforms)
    monkeypatch.setattr(f, "RoomyLayer", Float32Layer)
    expected = run.student.sample(ids_of(run, 6), uniforms)
    for ours, theirs in zip(drawn, expected):
        assert torch.equal(ours, theirs)


def plain_attention():
    """A Qwen3 as it is."""
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16))


def sliding_window():
    """A Qwen3 of which one layer sees only four tokens."""
    kinds = ["full_attention", "sliding_attention"]
    return Qwen3ForCausalLM(Qwen3Config(
        **SMALL, head_dim=16, use_sliding_window=True, sliding_window=4, layer_types=kinds))


def eager_attention():
    """A Qwen3 that computes attention step by step."""
    config = Qwen3Config(**SMALL, head_dim=16)
    return Qwen3ForCausalLM._from_config(config, attn_implementation="eager")


def absolute_positions():
    """A GPT-2."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3))


def scaled_positions(kind):
    """A Qwen3 whose positions depend on the longest row."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
            "long_factor": [8.0] * 8, "original_max_position_embeddings": 48}
    return Qwen3ForCausalLM(Qwen3Config(
        **SMALL, head_dim=16, max_position_embeddings=64, rope_parameters=rope))


def slopes_instead_of_positions():
    """A Falcon with ALiBi."""
    return transformers.FalconForCausalLM(transformers.FalconConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True))


@pytest.mark.parametrize("make,roomy", [
    (plain_attention, True),
    (sliding_window, False),
    (eager_attention, False),
    (absolute_positions, False),
    (functools.partial(scaled_positions, "dynamic"), False),
    (functools.partial(scaled_positions, "longrope"), False),
    (slopes_instead_of_positions, False),
])
def test_a_cache_has_room_only_where_that_changes_nothing(make, roomy):
    cache = f.RolloutCache(make(), position=torch.tensor([0]))
    assert cache.roomy == roomy


def test_cache_and_teachers_are_in_the_type_that_computes(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", dtype="bfloat16")
    caches = []

    class Noted(f.RolloutCache):
        def __init__(self, model, position):
            super().__init__(model, position)
            caches.append(self)

    monkeypatch.setattr(f, "RolloutCache", Noted)
    run.student.sample(ids_of(run, 4), random_uniforms(4, 8))
    for layer in caches[0].layers:
        assert layer.keys.dtype == torch.bfloat16
        assert layer.values.dtype == torch.bfloat16
    teacher = run.teachers["teacher"]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}  # the folder's are float32
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}


NO_TOKENS = [3, 7, 16, 17, 18, 19]


@pytest.fixture
def gappy(pair):
    """A policy whose vocabulary lacks the tokens 3 and 7, and the four padded rows."""
    model = Qwen3ForCausalLM.from_pretrained(pair / "student")
    vocabulary = set(range(16)) - {3, 7}
    return f.Policy(model, {14}, vocabulary, f.Config())


def test_what_is_not_in_the_vocabulary_is_never_sampled(gappy):
    uniforms = random_uniforms(2000, 1)
    tokens, log_probs, _ = gappy.sample([[1, 2]] * 2000, uniforms)
    drawn = tokens.unique().tolist()
    assert len(drawn) > 8
    assert not set(drawn) & set(NO_TOKENS)
    # What is left shares all of the probability.
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        logits = gappy.model(ids).logits[0, -1]
    logits[NO_TOKENS] = -math.inf
    assert_nearly_equal(log_probs, logits.log_softmax(0)[tokens])


def test_what_is_not_in_the_vocabulary_has_no_probability_in_scoring(gappy):
    """Every id once, after the same prompt: these are the probabilities of all of them."""
    ids = torch.tensor([[1, 2, i] for i in range(20)])
    mask = torch.zeros(20, 3, dtype=torch.bool)
    mask[:, 2] = True
    with torch.no_grad():
        log_probs, entropy = gappy(ids, mask)
    log_p = log_probs[:, 2]
    assert (log_p[NO_TOKENS] == -math.inf).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    finite = log_p[log_p.isfinite()]
    assert len(finite) == 14
    assert_nearly_equal(entropy[:, 2], entropy_of(finite[None]).expand(20))


def test_gaps_in_the_vocabulary_leave_gradients_finite(gappy):
    ids = torch.tensor([[1, 2, 4, 14]])
    log_probs, _ = gappy(ids, ids > 2)
    log_probs.sum().backward()
    gradients = [p.grad for p in gappy.parameters() if p.grad is not None]
    assert gradients
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_positions_are_counted_from_the_first_real_token_of_a_row():
    torch.manual_seed(0)
    model = absolute_positions().eval()
    policy = f.Policy(model, {14}, set(range(16)), f.Config())
    prompts = [[1, 2, 3, 4, 5], [6, 7]]  # the second one is padded
    tokens, log_probs, _ = policy.sample(prompts, random_uniforms(2, 6))
    for i, prompt in enumerate(prompts):
        response = tokens[i].tolist()
        with torch.no_grad():
            table = table_of(model, prompt, response)
        assert 14 not in response
        assert_nearly_equal(log_probs[i], picked(table, response))


def test_a_bias_of_the_head_is_sampled_scored_and_trained():
    torch.manual_seed(0)
    settings = SMALL | {"num_key_value_heads": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**settings)).eval()
    bias = model.lm_head.bias
    torch.nn.init.normal_(bias, std=2.0)
    policy = f.Policy(model, {14}, set(range(16)), f.Config())
    tokens, log_probs, _ = policy.sample([[1, 2]], random_uniforms(1, 3))
    response = tokens[0].tolist()
    table = table_of(model, [1, 2], response)
    expected = picked(table, response)
    assert_nearly_equal(log_probs[0], expected)
    ids = torch.tensor([[1, 2] + response])
    mask = torch.arange(5)[None] >= 2
    scored, _ = policy(ids, mask)
    assert_nearly_equal(scored[mask], expected)
    scored.sum().backward()
    got = bias.grad.clone()
    bias.grad.zero_()
    expected.sum().backward()
    assert_nearly_equal(got, bias.grad)


# --- One step ------------------------------------------------------------------------------------

THIRD_STEP = (7, f.SAMPLE, 3)  # of seed 7


def test_uniforms_are_a_function_of_their_row_alone():
    table = f.stateless_uniforms(THIRD_STEP, range(6), 4)
    assert table.dtype == torch.float64
    assert table.shape == (6, 4)
    assert len(table.unique()) == 24
    assert table.min() >= 0
    assert table.max() < 1
    elsewhere = f.stateless_uniforms(THIRD_STEP, [4, 1], 4)  # another rank, another batch
    assert torch.equal(elsewhere, table[[4, 1]])


@pytest.mark.parametrize("key", [
    (8, f.SAMPLE, 3),
    (7, f.EVALUATE, 3),
    (7, f.SAMPLE, 4),
])
def test_another_seed_purpose_or_step_has_other_uniforms(key):
    table = f.stateless_uniforms(THIRD_STEP, range(6), 4)
    other = f.stateless_uniforms(key, range(6), 4)
    assert not (other == table).any()


def test_a_row_that_is_written_longer_begins_alike():
    short = f.stateless_uniforms(KEY, range(3), 4)
    long = f.stateless_uniforms(KEY, range(3), 9)
    assert torch.equal(long[:, :4], short)


def test_every_prompt_is_met_once_an_epoch(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=16)
    met = []
    for run.step in range(5):  # 5 steps of 16 are two epochs of 40; the third step is in both
        met += [id(prompt) for prompt in f.step_prompts(run)]
    everyone = {id(prompt) for prompt in run.prompts}
    assert set(met[:40]) == everyone
    assert set(met[40:]) == everyone
    assert met[:40] != met[40:]


def test_the_rollouts_of_a_prompt_stand_side_by_side(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12, rollouts_per_prompt=3)
    prompts = f.step_prompts(run)
    assert len(prompts) == 12
    for i in range(0, 12, 3):
        assert prompts[i] is prompts[i + 1]
        assert prompts[i] is prompts[i + 2]
    assert len({id(prompt) for prompt in prompts}) == 4


def test_a_step_may_be_longer_than_an_epoch(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=100)
    met = [id(prompt) for prompt in f.step_prompts(run)]
    counts = [met.count(id(prompt)) for prompt in run.prompts]
    assert sorted(counts) == [2] * 20 + [3] * 20


def test_each_step_and_each_row_draws_anew(pair, tmp_path):
    prompts = write_rows(tmp_path / "one.jsonl", [{"prompt": "12+="}])
    run = loaded(pair, tmp_path / "out", prompts=prompts, lr=1e-12)
    graded, _ = f.train_step(run)
    first = responses_of(graded.rollouts)
    run.step = 1
    graded, _ = f.train_step(run)
    second = responses_of(graded.rollouts)
    assert first != second
    assert len(set(map(tuple, first))) > 1


def test_tables_are_laid_out_as_prompt_then_response_then_padding():
    prompts = []
    for ids in ([5, 6], [7, 8, 9]):
        prompts.append(f.Prompt(ids, None, "teacher", ""))
    tokens = torch.tensor([
        [1, 2, 3, 4],
        [1, 14, 3, 4]])  # the second response ends with its 14
    log_probs = -tokens / 10
    rollouts = f.lay_out(prompts, {14}, tokens, log_probs, 2 * log_probs)
    assert rollouts.lengths == [6, 5]
    assert rollouts.ids.tolist() == [
        [5, 6, 1, 2, 3, 4],
        [7, 8, 9, 1, 14, 0]]
    assert rollouts.mask.long().tolist() == [
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0]]
    expected = -rollouts.ids * rollouts.mask / 10  # what belongs to a token stands in its place
    assert torch.equal(rollouts.log_probs, expected)
    assert torch.equal(rollouts.student_entropy, 2 * expected)


def test_of_some_rows_only_the_width_that_they_need_is_taken(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12)
    rollouts = f.rollout(run, run.prompts[:12], KEY)
    shortest = rollouts.lengths.index(min(rollouts.lengths))
    ids = rollouts.select(rollouts.ids, [shortest])
    assert ids.shape == (1, rollouts.lengths[shortest])
    assert torch.equal(ids[0], rollouts.ids[shortest, :ids.shape[1]])


def test_each_row_is_scored_by_its_own_teacher(pair, tmp_path):
    teachers = [f"one={pair / 'teacher'}", f"two={pair / 'other'}"]
    run = loaded(pair, tmp_path / "out", prompts=pair / "routed.jsonl", teacher=teachers)
    models = {
        "one": Qwen3ForCausalLM.from_pretrained(pair / "teacher").double(),
        "two": Qwen3ForCausalLM.from_pretrained(pair / "other").double()}
    graded = graded_step(run)
    rollouts = graded.rollouts
    assert {prompt.teacher for prompt in rollouts.prompts} == {"one", "two"}
    for i, response in enumerate(responses_of(rollouts)):
        prompt = rollouts.prompts[i]
        with torch.no_grad():
            table = table_of(models[prompt.teacher], prompt.ids, response).float()
        own = rollouts.mask[i]
        assert_nearly_equal(graded.teacher_log_probs[i, own], picked(table, response))
        assert_nearly_equal(graded.teacher_entropy[i, own], entropy_of(table))


def rows_dropped(keep):
    """The numbers of the rows that the filter drops."""
    return (~keep).nonzero()[:, 0].tolist()


def test_the_random_filter_is_another_one_in_each_step(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", filter_by="random")
    scores = torch.arange(12.0)
    dropped = []
    for run.step in range(4):
        ranking = f.ranking(run, scores)
        keep = f.filter_trajectories(ranking, 20)
        dropped.append(rows_dropped(keep))
        assert len(dropped[-1]) == 3  # the quantile is between the third row and the fourth
    assert len(set(map(tuple, dropped))) == 4


def test_a_step_filters_at_random_if_told_to(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12)
    graded = graded_step(run)
    run.config.filter_by = "random"
    control = graded_step(run)
    assert torch.equal(graded.scores, control.scores)
    lowest_three = graded.scores.argsort()[:3].sort().values.tolist()
    assert rows_dropped(graded.keep) == lowest_three
    assert rows_dropped(control.keep) != lowest_three
    assert len(rows_dropped(control.keep)) == 3
    assert not control.weights[~control.keep].any()


def test_a_step_weighs_the_heavier_half_alone_if_told_to(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12)
    soft = graded_step(run)
    run.config.token_weights = "hard"
    hard = graded_step(run)
    assert torch.equal(soft.rollouts.ids, hard.rollouts.ids)
    assert not hard.weights[~hard.keep].any()
    for i in hard.keep.nonzero()[:, 0].tolist():
        own = hard.rollouts.mask[i]
        n = int(own.sum())
        half = math.ceil(n / 2)
        order = soft.weights[i, own].argsort(descending=True, stable=True)
        expected = torch.zeros(n)
        expected[order[:half]] = n / half
        assert_close(hard.weights[i, own], expected)


def noted_step(run):
    """A whole step but for its end: the optimizer notes the gradient and leaves it at that.
    -> Graded, metrics, gradients"""
    gradients = {}

    def note():
        for name, parameter in run.student.named_parameters():
            gradients[name] = parameter.grad.clone()

    run.optimizer.step = note
    graded, metrics = f.train_step(run)
    return graded, metrics, gradients


def naive_step(run, rollouts):
    """A step from the token ids alone: whole logits, loops, autograd, all of it in float64.
    -> the gradient of the student's parameters, and which rows are kept"""
    config = run.config
    student = copy.deepcopy(run.student.model).double()
    teacher = copy.deepcopy(run.teachers["teacher"].model).double()
    tables, scores = [], []
    for prompt, response in zip(rollouts.prompts, responses_of(rollouts)):
        s = table_of(student, prompt.ids, response, config.temperature)
        t = table_of(teacher, prompt.ids, response, config.temperature)
        tables.append((s, t, response))
        scores.append(picked(t, response).mean().item())
    threshold = np.quantile(scores, config.filter_percentile / 100)
    losses = []
    for (s, t, response), score in zip(tables, scores):
        if score < threshold:
            continue
        confidence = 1 - entropy_of(t) / entropy_of(t).max()
        confusion = entropy_of(s) / entropy_of(s).max()
        weights = (1 + config.alpha * confidence) * (1 + config.beta * confusion)
        weights = weights / weights.mean()
        advantages = picked(t, response) - picked(s, response)
        # The ratio to the old policy is 1, and its gradient that of log pi.
        praise = (weights * advantages).detach()
        losses.append(-praise * picked(s, response))
    if config.loss_agg == "seq-mean":
        losses = [tokens.mean()[None] for tokens in losses]
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {}
    for name, parameter in student.named_parameters():
        gradients["model." + name] = parameter.grad
    return gradients, [score >= threshold for score in scores]


@pytest.mark.parametrize("settings", [
    {},
    {"temperature": 0.6, "alpha": 2.0, "beta": 0.3, "filter_percentile": 50.0},
    {"loss_agg": "seq-mean", "filter_percentile": 0.0},
    {"loss_agg": "seq-mean", "micro_batch_tokens": 40},
], ids=str)
def test_a_whole_step_agrees_with_a_naive_float64_reference(pair, tmp_path, settings):
    run = loaded(pair, tmp_path / "out", batch_size=12, max_grad_norm=1e9, **settings)
    graded, _, gradients = noted_step(run)
    expected, kept = naive_step(run, graded.rollouts)
    assert graded.keep.tolist() == kept
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient.double(), expected[name], rtol=1e-3, atol=1e-5)


def assert_same_gradient(a, b, atol=1e-6):
    """Two dicts of gradients agree but for the order of their sums."""
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], rtol=1e-4, atol=atol)


def test_the_gradient_is_clipped_to_the_largest_norm_and_keeps_its_direction(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", max_grad_norm=1e9)
    graded = graded_step(run)
    whole, _ = gradient(run, graded)
    entries = torch.cat([x.flatten() for x in whole.values()])
    norm = entries.norm().item()
    run.config.max_grad_norm = norm / 4
    clipped, metrics = gradient(run, graded)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)  # the norm that it had
    expected = {name: x / 4 for name, x in whole.items()}
    assert_same_gradient(clipped, expected, atol=1e-8)


def test_the_first_update_is_that_of_adamw(pair, tmp_path):
    """In its first step AdamW shrinks a weight by lr times decay and moves it by lr times the
    gradient's sign, with 1e-8 where the gradient is 0."""
    run = loaded(pair, tmp_path / "out", lr=1e-3, weight_decay=0.1)
    graded = graded_step(run)
    step = run.optimizer.step
    gradients, _ = gradient(run, graded)
    run.optimizer.step = step
    before = copy.deepcopy(run.student.state_dict())
    metrics = update(run, graded)
    assert metrics["skipped_updates"] == 0
    for name, parameter in run.student.named_parameters():
        g = gradients[name]
        sign = g / (g.abs() + 1e-8)
        expected = before[name] * (1 - 1e-3 * 0.1) - 1e-3 * sign
        assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameter, before[name])


def test_the_gradient_does_not_depend_on_the_micro_batches(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12, max_grad_norm=1e9)
    graded = graded_step(run)
    rows = graded.keep.nonzero()[:, 0].tolist()
    lengths = graded.rollouts.lengths
    assert len(f.micro_batches(rows, lengths, 8192)) == 1
    whole, whole_metrics = gradient(run, graded)
    cuts = []
    for budget in (60, 30, 1):
        batches = f.micro_batches(rows, lengths, budget)
        cuts.append(len(batches))
        run.config.micro_batch_tokens = budget
        parts, metrics = gradient(run, graded)
        assert metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-5)
        assert_same_gradient(parts, whole)
    assert 1 < cuts[0] < cuts[1] < cuts[2]
    assert cuts[2] == len(rows)


def test_scores_do_not_depend_on_the_micro_batches(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12)
    rollouts = graded_step(run).rollouts
    log_probs, entropy = f.score(run, rollouts)
    run.config.micro_batch_tokens = 30
    parts, entropy_of_parts = f.score(run, rollouts)
    assert_nearly_equal(parts, log_probs)
    assert_nearly_equal(entropy_of_parts, entropy)
    assert not log_probs[~rollouts.mask].any()


@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean"])
@pytest.mark.parametrize("ranks", [2, 6])
def test_the_gradients_of_the_ranks_average_to_that_of_one(
        pair, tmp_path, monkeypatch, ranks, loss_agg):
    """Without processes: each rank in turn, and then the mean that DDP and FSDP take."""
    run = loaded(pair, tmp_path / "out", max_grad_norm=1e9, loss_agg=loss_agg)
    graded = graded_step(run)
    assert graded.keep.sum() < 6  # of six ranks some has none
    whole, whole_metrics = gradient(run, graded)
    monkeypatch.setattr(f, "WORLD_SIZE", ranks)
    monkeypatch.setattr(f, "sum_over_ranks", torch.Tensor.clone)
    mean = {name: 0 for name in whole}
    loss = 0
    for rank in range(ranks):
        monkeypatch.setattr(f, "RANK", rank)
        own, metrics = gradient(run, graded)
        loss += metrics["loss"]
        for name in mean:
            mean[name] += own[name] / ranks
    assert loss == pytest.approx(whole_metrics["loss"], rel=1e-5)
    assert_same_gradient(mean, whole)


def test_without_filter_and_weights_it_is_plain_distillation_to_the_bit(pair, tmp_path):
    plain = {"filter_percentile": 0, "alpha": 0, "beta": 0}
    run = loaded(pair, tmp_path / "out", batch_size=12, max_grad_norm=1e9, **plain)
    graded, _, gradients = noted_step(run)
    rollouts = graded.rollouts
    assert graded.keep.all()
    assert torch.equal(graded.weights, rollouts.mask.float())
    run.student.zero_grad()
    [rows] = f.micro_batches(range(12), rollouts.lengths, 8192)  # they all fit into one
    mask = rollouts.mask[rows]
    log_probs, _ = run.student(rollouts.ids[rows], mask)
    advantages = graded.teacher_log_probs[rows] - log_probs.detach()
    advantages = advantages.masked_fill(~mask, 0)
    ratio = (log_probs - log_probs.detach()).exp()
    loss = -(ratio * advantages).sum() / int(mask.sum())
    loss.backward()
    for name, parameter in run.student.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", teacher=pair / "student")
    _, metrics, gradients = noted_step(run)
    assert abs(metrics["reverse_kl"]) < 1e-5
    assert abs(metrics["reverse_kl_kept"]) < 1e-6
    assert abs(metrics["loss"]) < 1e-6
    for gradient in gradients.values():
        assert gradient.abs().max() < 1e-5


def test_dropped_trajectories_never_enter_the_students_forward(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", batch_size=10, filter_percentile=60)
    forward = run.student.forward
    seen = []

    def noted(ids, mask):
        for row, response in zip(ids, mask):
            seen.append(row[response].tolist())
        return forward(ids, mask)

    monkeypatch.setattr(run.student, "forward", noted)
    graded, _ = f.train_step(run)
    responses = responses_of(graded.rollouts)
    kept = [responses[i] for i in range(10) if graded.keep[i]]
    assert len(kept) == 4
    assert sorted(seen) == sorted(kept)
    assert not graded.weights[~graded.keep].any()


def test_the_old_policy_is_this_very_pass(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", filter_percentile=0)
    policy_loss = f.policy_loss
    seen = []

    def noted(log_probs, old_log_probs, *rest, **options):
        seen.append((log_probs, old_log_probs))
        return policy_loss(log_probs, old_log_probs, *rest, **options)

    monkeypatch.setattr(f, "policy_loss", noted)
    f.train_step(run)
    log_probs, old_log_probs = seen[0]
    assert torch.equal(log_probs, old_log_probs)
    assert log_probs.requires_grad
    assert not old_log_probs.requires_grad


def kept_by(run):
    """How many numbers the update keeps of the student's forward pass."""
    rollouts = f.rollout(run, run.prompts[:12], KEY)
    return kept_for_backward(run.student, rollouts.ids, rollouts.mask)


def test_gradient_checkpointing_keeps_little_for_the_backward_pass(pair, tmp_path):
    run = loaded(pair, tmp_path / "a")
    recomputed = loaded(pair, tmp_path / "b", gradient_checkpointing=True)
    assert kept_by(recomputed) < kept_by(run) / 4


def test_gradient_checkpointing_changes_no_gradient(pair, tmp_path):
    run = loaded(pair, tmp_path / "a")
    graded = graded_step(run)
    whole, _ = gradient(run, graded)
    run = loaded(pair, tmp_path / "b", gradient_checkpointing=True)
    calls = []

    def count(*args):
        calls.append(1)

    run.student.model.model.layers[0].mlp.register_forward_pre_hook(count)
    recomputed, _ = gradient(run, graded)
    assert len(calls) == 2  # once in forward and once more in backward
    assert_same_gradient(recomputed, whole)


def test_gradient_checkpointing_changes_no_rollout(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", gradient_checkpointing=True)
    plain = loaded(pair, tmp_path / "plain")
    uniforms = random_uniforms(4, 8)
    drawn = run.student.sample(ids_of(run, 4), uniforms)
    expected = plain.student.sample(ids_of(run, 4), uniforms)
    for ours, theirs in zip(drawn, expected):
        assert torch.equal(ours, theirs)


def test_a_row_with_a_nan_is_dropped_and_the_others_are_trained_on(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out")
    score = f.score

    def with_a_nan(run, rollouts):
        log_probs, entropy = score(run, rollouts)
        log_probs[2, len(rollouts.prompts[2].ids)] = math.nan
        return log_probs, entropy

    monkeypatch.setattr(f, "score", with_a_nan)
    graded, metrics = f.train_step(run)
    assert not graded.keep[2]
    assert graded.keep.sum() >= 3
    assert metrics["skipped_updates"] == 0
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["grad_norm"])
    assert math.isfinite(metrics["reverse_kl"])  # the figures, too, are those of the others


def assert_skipped(run, graded):
    """The update of this step changes nothing, and leaves nothing that would spoil the next."""
    before = copy.deepcopy(run.student.state_dict())
    metrics = update(run, graded)
    assert metrics["skipped_updates"] == 1
    assert math.isnan(metrics["loss"])
    assert_equal(run.student.state_dict(), before)
    assert not run.optimizer.state
    for parameter in run.student.parameters():
        assert parameter.grad is None


def a_nan_grade(graded):
    """As if a row without a score had slipped through."""
    row = graded.keep.nonzero()[0]
    graded.teacher_log_probs[row] = math.nan


def nothing_is_kept(graded):
    graded.keep[:] = False


def a_nan_of_the_sampler(graded):
    """Even in a row that is dropped: what else it drew is not what the student would say."""
    row = (~graded.keep).nonzero()[0]
    graded.rollouts.log_probs[row, -1] = math.nan


@pytest.mark.parametrize("spoil", [a_nan_grade, nothing_is_kept, a_nan_of_the_sampler])
def test_a_step_that_went_wrong_changes_nothing(pair, tmp_path, spoil):
    run = loaded(pair, tmp_path / "out")
    graded = graded_step(run)
    good = copy.deepcopy(graded)
    spoil(graded)
    assert_skipped(run, graded)
    metrics = update(run, good)
    assert metrics["skipped_updates"] == 0
    assert math.isfinite(metrics["loss"])


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing(pair, tmp_path):
    run = loaded(pair, tmp_path / "out")
    graded = graded_step(run)
    weight = run.student.model.model.norm.weight
    handle = weight.register_hook(torch.full_like(weight, math.inf).mul)
    assert_skipped(run, graded)
    handle.remove()
    metrics = update(run, graded)
    assert metrics["skipped_updates"] == 0


def test_micro_batches_are_filled_from_the_longest_row_on():
    lengths = [3, 9, 4, 8, 2, 99]
    # Sorted: 9, 8, 4, 3, 2. Two of 9 are over the budget; two of 8 fit; so do two of 3.
    batches = f.micro_batches(range(5), lengths, 16)
    assert batches == [[1], [3, 2], [0, 4]]


def test_a_row_longer_than_the_budget_has_a_micro_batch_of_its_own():
    lengths = [5, 50, 5]
    batches = f.micro_batches(range(3), lengths, 10)
    assert batches == [[1], [0, 2]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_of_no_rows_there_are_no_micro_batches_on_any_rank(monkeypatch, ranks):
    monkeypatch.setattr(f, "WORLD_SIZE", ranks)
    for rank in range(ranks):
        monkeypatch.setattr(f, "RANK", rank)
        assert f.micro_batches([], [4, 4], 10) == []


@pytest.mark.parametrize("seed", range(10))
def test_micro_batches_keep_the_budget_and_lose_no_row(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, 40).tolist()
    rows = rng.choice(40, 25, replace=False).tolist()
    budget = int(rng.integers(1, 200))
    batches = f.micro_batches(rows, lengths, budget)
    for batch in batches:
        if len(batch) > 1:
            padded = len(batch) * max(lengths[i] for i in batch)
            assert padded <= budget
    assert sorted(itertools.chain.from_iterable(batches)) == sorted(rows)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_row_is_on_one_rank_and_all_ranks_have_as_many_micro_batches(
        monkeypatch, seed, ranks):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, 40).tolist()
    count = rng.integers(1, 40)
    rows = rng.choice(40, count, replace=False).tolist()
    budget = int(rng.integers(1, 300))
    monkeypatch.setattr(f, "WORLD_SIZE", ranks)
    met, counts = [], set()
    for rank in range(ranks):
        monkeypatch.setattr(f, "RANK", rank)
        batches = f.micro_batches(rows, lengths, budget)
        counts.add(len(batches))
        for batch in batches:
            met += batch
    assert sorted(met) == sorted(rows)
    assert len(counts) == 1  # else some rank would wait for ever


def test_rows_are_spread_over_the_ranks_before_a_budget_is_filled(monkeypatch):
    monkeypatch.setattr(f, "WORLD_SIZE", 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(f, "RANK", rank)
        [rows] = f.micro_batches(range(6), [9, 8, 7, 6, 5, 4], 10**6)
        shares.append(rows)
    assert shares == [[0, 1], [2, 3], [4, 5], []]


def test_a_micro_batch_without_rows_has_a_gradient_of_zeros(pair, tmp_path):
    """A rank that has none takes part in the exchange of gradients all the same."""
    run = loaded(pair, tmp_path / "out")
    rollouts = graded_step(run).rollouts
    ids = rollouts.select(rollouts.ids, [])
    mask = rollouts.select(rollouts.mask, [])
    log_probs, _ = run.student(ids, mask)
    old = log_probs.detach()
    loss = f.policy_loss(log_probs, old, old, old, mask, num_tokens=5)
    loss.backward()
    for name, parameter in run.student.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def skip_if_nothing_is_compiled():
    """Where torch sees no real device, its compiler may leave everything as it is."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch.compile(torch.sin, backend=backend)(torch.ones(2))
    if not seen:
        pytest.skip("torch.compile compiles nothing in this process")



@slow
def test_scoring_is_compiled_and_decoding_is_not(pair, tmp_path, monkeypatch):
    """Compiled for one token at a time, decoding would be compiled again for every length."""
    skip_if_nothing_is_compiled()
    calls = []

    def backend(graph, inputs):
        """In place of a compiler: runs a traced graph as it is, and notes that."""

        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    traced = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", traced)
    run = loaded(pair, tmp_path / "out", compile=True)
    rollouts = f.rollout(run, run.prompts[:2], KEY)
    calls.clear()
    again = f.rollout(run, run.prompts[:2], KEY)
    assert not calls
    assert torch.equal(again.ids, rollouts.ids)
    f.score(run, rollouts)
    assert len(calls) == 3  # two blocks and the head
    torch._dynamo.reset()


def metrics_of_steps(run):
    """Three steps. -> the metrics of each"""
    rows = []
    for run.step in range(3):
        graded, metrics = f.train_step(run)
        rows.append(metrics)
    return rows


@slow
@pytest.mark.filterwarnings("ignore:.*script_method")  # in torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_changes_no_figure(pair, tmp_path):
    torch._dynamo.reset()
    skip_if_nothing_is_compiled()
    torch._dynamo.utils.counters.clear()
    eager = loaded(pair, tmp_path / "eager")
    expected = metrics_of_steps(eager)
    assert not torch._dynamo.utils.counters["stats"]
    compiled = loaded(pair, tmp_path / "compiled", compile=True, gradient_checkpointing=True)
    assert_same_metrics(metrics_of_steps(compiled), expected, rel=1e-4, abs=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # blocks and head
    assert kept_by(compiled) < kept_by(eager) / 4
# --- Metrics and evaluation ----------------------------------------------------------------------

# What a case shows: the end of a response, the answer in the data.
RIGHT = {
    "a box may hold braces": ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
    "the last box counts": ("\\boxed{3} or \\boxed{4}", "4"),
    "a box wins over a later number": ("\\boxed{3}, see page 9", "3"),
    "the last number counts": ("It=18, so", "18"),
    "the last of a list": ("values are 1,2,3", "3"),
    "after a range's dash": ("about 3-5", "5"),
    "a number of one's own after words": ("it is 1/2", "1/2"),
    "without a number it is all of it": ("blue", "blue"),
    "a whole response": ("01358", "01358"),
    "thousands separators": ("it is 1,000", "1000"),
    "a price with a full stop": ("The answer is $1,234.", "1234"),
    "millions in a box": ("\\boxed{1,234,567}", "1234567"),
    "separators of LaTeX": ("\\boxed{1\\,000}", "\\boxed{1{,}000}"),
    "a separator with a negative space": ("\\boxed{1,\\!000}", "1000"),
    "a number without its zero": ("it is .5", "0.5"),
    "a zero at the end": ("\\boxed{\\$18.50}", "18.5"),
    "an integer as a decimal": ("3", "3.0"),
    "a minus sign of Unicode": ("it is \u22125", "-5"),
    "text in a box": ("\\boxed{\\text{no}}", "no"),
    "brackets that grow": ("\\boxed{\\left( 3, 4 \\right)}", "(3,4)"),
    "an answer as a worked solution": ("\\boxed{\\dfrac12}", "so \\boxed{\\frac12}."),
    "an answer after GSM8K's hashes": ("72%", "it is 72.\n#### 72"),
}
WRONG = {
    "not the first box": ("\\boxed{3} or \\boxed{4}", "3"),
    "not an earlier number": ("12 apples, then 7", "12"),
    "not a fraction's denominator": ("it is 1/2", "2"),
    "not what follows a point": ("it is .5", "5"),
    "not without its sign": ("it is \u22125", "5"),
    "a pair is not a number": ("\\boxed{1,2}", "12"),
    "nor is a list": ("1,2,3", "123"),
    "a box that does not end": ("\\boxed{", "3"),
    "nothing": ("", "3"),
}


@pytest.mark.parametrize("response,answer", RIGHT.values(), ids=RIGHT)
def test_an_answer_is_the_last_box_or_the_last_number_or_the_whole_response(response, answer):
    assert f.is_correct(response, answer) is True


@pytest.mark.parametrize("response,answer", WRONG.values(), ids=WRONG)
def test_another_answer_is_wrong(response, answer):
    assert f.is_correct(response, answer) is False


@pytest.mark.parametrize("text,answer", [
    ("\\boxed{a{b}c} and \\boxed{d{e}}f}", "d{e}"),
    ("\\boxed{3", "3"),  # it was cut off: its last number
    ("from -1.5 to -2.25.", "-2.25"),
    ("1,234,567 or 12,34", "34"),  # the first is a number with separators, the second are two
    ("3/4", "3/4"),
    ("no number", "no number")])
def test_the_final_answer_of_a_text(text, answer):
    assert f.final_answer(text) == answer


@pytest.mark.parametrize("text,plain", [
    (" $ 5 \\% ", "5"),
    ("1,234,567", "1234567"),
    ("1,2", "1,2"),
    ("1,2345", "1,2345"),
    ("-.50", "-0.5"),
    ("3.00", "3"),
    ("100", "100"),
    ("10.", "10"),
    ("\\tfrac{1}{2}", "\\frac{1}{2}"),
    ("\u22127", "-7")])
def test_an_answer_is_normalized(text, plain):
    assert f.normalized(text) == plain


class Ending:
    """A student, as far as metrics look at it."""
    eos_ids = {14}


def run_without_models(tokenizer, **settings):
    """What metrics, screen and report need of a Run."""
    config = f.Config(**settings)
    return f.Run(config, config, tokenizer, prompts=[], eval_prompts=[], student=Ending(),
                 trained=None, optimizer=None, files={}, teachers={"teacher": None})


def three_rollouts(tokenizer):
    """A Run, and a step with figures that are easily added up: two rollouts are kept, of which
    one is right, and the third, which is dropped, never ends and has no known answer."""
    prompts = [
        f.Prompt([1], "12", "teacher", "a"),
        f.Prompt([1], "3", "teacher", "b"),
        f.Prompt([1], None, "teacher", "a")]
    tokens = [
        [1, 2, 14],
        [4, 14, 0],
        [6, 6, 6]]
    student_entropy = [
        [1.0, 2, 3],
        [5.0, 5, 0],
        [4.0, 4, 4]]
    rollouts = f.lay_out(
        prompts, {14}, torch.tensor(tokens), -torch.ones(3, 3), torch.tensor(student_entropy))
    # Each of these rows begins with the prompt's one token.
    teacher_log_probs = [
        [0.0, -1, -1, -1],
        [0.0, -2, -2, 0],
        [0.0, -4, -4, -4]]
    teacher_entropy = [
        [0.0, 1, 1, 1],
        [0.0, 3, 3, 0],
        [0.0, 2, 2, 2]]
    weights = [
        [0.0, 2, 0.5, 0.5],
        [0.0, 1, 1, 0],
        [0.0, 0, 0, 0]]
    graded = f.Graded(
        rollouts, torch.tensor(teacher_log_probs), torch.tensor(teacher_entropy),
        scores=torch.tensor([-1.0, -2, -4]), keep=torch.tensor([True, True, False]),
        weights=torch.tensor(weights))
    return run_without_models(tokenizer), graded


def averages_of(rows, run, graded):
    """The metrics of these rows, by their numbers."""
    chosen = torch.zeros(3, dtype=torch.bool)
    for i in rows:
        chosen[i] = True
    return f.averages(run, graded, {"": chosen})


def test_what_has_no_known_answer_is_neither_right_nor_wrong():
    run, graded = three_rollouts(f.tiny_tokenizer())
    right, wrong, unknown = f.correctness(run, graded.rollouts).tolist()
    assert right == 1
    assert wrong == 0
    assert math.isnan(unknown)


def test_averages_are_over_tokens_or_trajectories():
    run, graded = three_rollouts(f.tiny_tokenizer())
    assert averages_of([0, 1, 2], run, graded) == pytest.approx({
        "reverse_kl": (3 * 0 + 2 * 1 + 3 * 3) / 8,  # log pi_S - log pi_T of eight tokens
        "score": -(1 + 2 + 4) / 3,
        "teacher_entropy": (3 * 1 + 2 * 3 + 3 * 2) / 8,
        "student_entropy": (1 + 2 + 3 + 5 + 5 + 3 * 4) / 8,
        "response_length": 8 / 3,
        "truncated_ratio": 1 / 3,
        "exact_match": 1 / 2})  # of the two answers that are known


def test_averages_of_some_rows_see_no_others():
    run, graded = three_rollouts(f.tiny_tokenizer())
    dropped = averages_of([2], run, graded)
    assert dropped["reverse_kl"] == 3
    assert dropped["truncated_ratio"] == 1
    assert "exact_match" not in dropped  # nothing is known of it
    nothing = averages_of([], run, graded)
    assert math.isnan(nothing["reverse_kl"])


def test_a_row_without_a_score_is_in_no_average():
    run, graded = three_rollouts(f.tiny_tokenizer())
    graded.scores[2] = math.nan
    graded.teacher_log_probs[2] = math.nan
    figures = averages_of([0, 1, 2], run, graded)
    assert figures["reverse_kl"] == pytest.approx((3 * 0 + 2 * 1) / 5)
    assert figures["response_length"] == 2.5


def test_a_response_that_ends_with_its_last_token_is_not_truncated():
    """Counted by ends, not by lengths: a response of the longest length may have ended."""
    run, graded = three_rollouts(f.tiny_tokenizer())
    figures = averages_of([0], run, graded)
    assert figures["response_length"] == 3  # as long as any
    assert figures["truncated_ratio"] == 0


def test_an_end_of_sequence_in_the_prompt_ends_no_response():
    run, graded = three_rollouts(f.tiny_tokenizer())
    graded.rollouts.ids[2, 0] = 14
    assert averages_of([2], run, graded)["truncated_ratio"] == 1


class StoppedClock(f.Stopwatch):
    """Each phase takes a second."""

    def lap(self, phase):
        self.seconds["seconds_" + phase] = 1.0


def test_the_row_of_a_step_worked_by_hand():
    run, graded = three_rollouts(f.tiny_tokenizer())
    run.step = 6
    stopwatch = StoppedClock()
    for phase in ("rollout", "score", "update"):
        stopwatch.lap(phase)
    figures = f.measure_step(run, graded, stopwatch)
    assert figures["step"] == 7  # the first step is 1
    assert figures["keep_ratio"] == pytest.approx(2 / 3)
    assert figures["filter_threshold"] == -2  # the lowest score that was kept
    # The effective sample size of the weights 2, 1/2, 1/2, 1, 1, as a share of their number:
    assert figures["weight_ess"] == pytest.approx(5**2 / 6.5 / 5)
    assert figures["reverse_kl"] == pytest.approx(11 / 8)
    assert figures["reverse_kl_kept"] == pytest.approx(2 / 5)
    assert figures["reverse_kl_dropped"] == 3
    assert figures["exact_match_kept"] == 0.5
    assert "exact_match_dropped" not in figures
    assert figures["truncated_ratio_kept"] == 0
    assert figures["truncated_ratio_dropped"] == 1
    assert figures["seconds_update"] == 1
    assert figures["tokens_per_second"] == 8 / 4  # 8 tokens; its own phase is the fourth second
    assert "keep_ratio/teacher" not in figures  # there is one teacher


def test_each_of_several_teachers_has_its_keep_ratio():
    run, graded = three_rollouts(f.tiny_tokenizer())
    run.teachers = {"one": None, "two": None, "idle": None}
    for prompt, name in zip(graded.rollouts.prompts, ("one", "two", "two")):
        prompt.teacher = name
    figures = f.measure_step(run, graded, StoppedClock())
    assert figures["keep_ratio/one"] == 1
    assert figures["keep_ratio/two"] == 0.5
    assert math.isnan(figures["keep_ratio/idle"])


def test_a_step_that_keeps_nothing_still_has_its_row():
    run, graded = three_rollouts(f.tiny_tokenizer())
    graded.keep[:] = False
    figures = f.measure_step(run, graded, StoppedClock())
    assert figures["keep_ratio"] == 0
    assert math.isnan(figures["filter_threshold"])
    assert math.isnan(figures["weight_ess"])
    assert figures["reverse_kl_dropped"] == figures["reverse_kl"]


def test_a_stopwatch_gives_each_phase_its_seconds(monkeypatch):
    times = iter([10.0, 11.0, 13.5])
    with monkeypatch.context() as patch:
        patch.setattr(f.time, "perf_counter", lambda: next(times))
        stopwatch = f.Stopwatch()
        stopwatch.lap("rollout")
        stopwatch.lap("score")
    assert stopwatch.seconds == {"seconds_rollout": 1, "seconds_score": 2.5}


def test_an_evaluation_draws_the_same_uniforms_each_time(pair, tmp_path):
    """Else the difference of two evaluations would be mostly that of their draws."""
    run = loaded(pair, tmp_path / "out", eval_prompts=pair / "prompts.jsonl")
    f.evaluate(run)
    run.step = 2
    f.evaluate(run)
    run.config.seed = 1
    f.evaluate(run)
    first, second, other_seed = log_of(tmp_path / "out")
    assert first["step"] == 0
    assert second["step"] == 2
    assert first | {"step": 2} == second
    assert first["eval/reverse_kl"] != other_seed["eval/reverse_kl"]


def test_an_evaluation_has_the_figures_of_each_domain(pair, tmp_path, capsys):
    run = loaded(pair, tmp_path / "out", eval_prompts=pair / "prompts.jsonl")
    run.eval_prompts[0].domain = ""  # of no domain: only in the figures of all
    capsys.readouterr()
    f.evaluate(run)
    row = log_of(tmp_path / "out")[0]
    lengths = {}
    for name in ("", "/a", "/b"):
        assert "eval/exact_match" + name in row
        lengths[name] = row["eval/response_length" + name]
    rollouts = f.rollout(run, run.eval_prompts, (0, f.EVALUATE))
    own = [len(tokens) for tokens in responses_of(rollouts)]
    assert lengths[""] == pytest.approx(np.mean(own))
    assert lengths["/a"] == pytest.approx(np.mean(own[2::2]))  # prompts 2, 4, ... 38
    assert lengths["/b"] == pytest.approx(np.mean(own[1::2]))
    assert "loss" not in row
    assert "eval/exact_match/" not in row
    assert f"reverse_kl/a {row['eval/reverse_kl/a']:.3f}" in capsys.readouterr().out


def test_steps_0_evaluates_and_writes_nothing(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = flags(pair, "out", steps=0, eval_prompts=pair / "prompts.jsonl")
    f.main(argv)
    assert "step 0: evaluation: reverse_kl" in capsys.readouterr().out
    f.main([*argv, "--output-dir", ""])  # nor in a folder that it would name itself
    assert "step 0: evaluation: reverse_kl" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# --- The screen and the report -------------------------------------------------------------------

class HostileTokenizer:
    """Its tokens are what a page or a terminal must not obey."""
    tokens = ["0", "<script>alert(1)</script>", "\x1b[2J", "3", "a&b", "5", "\r\u202e", "7", "8",
              "9", "10", "11", "12", "13", "</span>"]

    def decode(self, ids, skip_special_tokens=False):
        text = ""
        for i in torch.as_tensor(ids).flatten().tolist():
            text += self.tokens[i]
        return text


def test_a_rollout_on_the_screen_is_two_lines_and_moves_no_cursor():
    run, graded = three_rollouts(HostileTokenizer())
    text = f.rollout_text(run, graded, 0)  # prompt 1, response 1 2 14
    assert text == (
        "kept, score -1.000: '<script>alert(1)</script>' -> "
        "'<script>alert(1)</script>\\x1b[2J</span>'\n"
        "    least likely to the teacher (log pi_T): '<script>alert(1)</script>' -1.00, "
        "'\\x1b[2J' -1.00, '</span>' -1.00")
    text = f.rollout_text(run, graded, 2)
    assert text.startswith("DROPPED, score -4.000")
    assert "'\\r\\u202e\\r\\u202e\\r\\u202e'" in text


def test_the_least_likely_token_comes_first():
    run, graded = three_rollouts(f.tiny_tokenizer())
    log_probs = [-99.0, -3, -0.1, -7]  # the first stands where the prompt is
    graded.teacher_log_probs[0] = torch.tensor(log_probs)
    text = f.least_likely(run, graded, 0)
    assert text.endswith(": '<eos>' -7.00, '1' -3.00, '2' -0.10")


def long_rollouts(prompts, length):
    """A step with long rollouts of these prompts; of its scores 0, -1, ... the first 900 stay."""
    B = len(prompts)
    tokens = torch.full((B, length), 7)
    ones = torch.ones(B, length)
    rollouts = f.lay_out(prompts, {14}, tokens, -ones, ones)
    table = torch.ones(rollouts.ids.shape)
    scores = -torch.arange(float(B))
    return f.Graded(rollouts, -table, table, scores, keep=scores > -900, weights=table)


def test_a_long_rollout_is_a_few_lines_on_the_screen_and_in_the_report():
    run = run_without_models(f.tiny_tokenizer())
    prompt = f.Prompt([3] * 5000, None, "teacher", "")
    graded = long_rollouts([prompt], 5000)
    text = f.rollout_text(run, graded, 0)
    assert len(text) < 1000
    assert text.count("\n") == 1
    page = f.rollout_html(run, graded, 0)
    assert page.count("<span") == 1 + 300  # the prompt's end, and the first tokens
    assert "... and 4700 more tokens" in page


def hostile_report(folder):
    """report.html of a step whose rollouts, prompts and domains are markup. -> the page"""
    run, graded = three_rollouts(HostileTokenizer())
    run.config.output_dir = str(folder)
    run.step = run.config.steps = 1
    run.config.student = "a&b<c"
    for prompt in graded.rollouts.prompts:
        prompt.ids = [1, 4]
        prompt.domain = "<script>&" + prompt.domain
    graded.rollouts.ids[graded.rollouts.ids == 2] = 4  # a page has nothing against \x1b, XML has
    graded.rollouts.ids[graded.rollouts.ids == 6] = 1
    metrics = f.measure_step(run, graded, StoppedClock())
    metrics |= {"loss": 0.0, "skipped_updates": 0, "eval/reverse_kl/<script>&a": 1.0}
    f.report_step(run, graded, metrics)
    f.write_report(run)
    return Path(folder, "report.html").read_text(encoding="utf-8")


def parsed(page):
    """A page as a tree: it is XML but for its first line, so that a tag left open is found."""
    doctype, rest = page.split("\n", 1)
    assert doctype == "<!doctype html>"
    return ElementTree.fromstring(rest)


def test_the_report_is_a_page_of_its_own_whatever_its_rollouts_say(tmp_path, capsys):
    page = hostile_report(tmp_path)
    tree = parsed(page)
    assert {"h3", "svg", "span"} < {element.tag for element in tree.iter()}
    for outside in ("<script", "<link", "http", "src=", "href=", "url(", "@import"):
        assert outside not in page
    text = "".join(tree.itertext())
    assert text.count("<script>alert(1)</script>a&b") >= 3  # prompts and responses are there
    assert "<script>" in [element.text for element in tree.iter("text")]  # a domain, shortened
    assert "eval/reverse_kl/<script>&a" in text
    assert "--student=a&b<c" in text


def test_the_report_holds_the_numbers_of_the_log(pair, tmp_path, capsys):
    settings = {"eval_prompts": pair / "prompts.jsonl", "eval_every": 2, "filter_percentile": 40}
    f.main(flags(pair, tmp_path / "out", **settings))
    page = Path(tmp_path, "out", "report.html").read_text(encoding="utf-8")
    text = "".join(parsed(page).itertext())
    text = " ".join(text.split())
    rows = log_of(tmp_path / "out")
    for name in ("eval/exact_match", "eval/reverse_kl", "eval/reverse_kl/b", "reverse_kl",
                 "reverse_kl_kept", "reverse_kl_dropped", "keep_ratio", "filter_threshold",
                 "response_length"):
        values = [row[name] for row in rows if name in row]
        assert f"{name} {values[-1]:.3f}" in text
    assert "Step 1" in text
    assert "Step 3" in text
    for row in (rows[1], rows[-2]):  # the first and the last step
        assert f"the lowest that was kept is {row['filter_threshold']:.3f}" in text
    assert text.count("DROPPED, score") == 4  # two of each step
    assert text.count("kept, score") == 4
    assert "The run, without defaults: python fire_opd.py --filter-percentile=40.0" in text


def test_a_chart_shows_each_value_in_its_place():
    rows = [
        {"step": 0, "y": 0.0},
        {"step": 1},
        {"step": 2, "y": 1.0},
        {"step": 4, "y": 2.0}]
    chart = ElementTree.fromstring(f.chart(rows, ["y", "unknown"]))
    points = chart.find("svg/polyline").get("points").split()
    # Steps 0 to 4 lie at 50 to 390 pixels from the left, values 0 to 2 at 150 to 10 from the top.
    assert points[:3] == ["50.0,150.0", "220.0,80.0", "390.0,10.0"]
    assert set(points[3:]) <= {"390.0,10.0"}
    labels = [element.text for element in chart.iter("text")]
    assert labels == ["2", "0", "0", "step 4"]
    assert chart.find("figcaption/b").text == "y 2.000"


@slow
def test_the_report_of_a_long_run_stays_small(tmp_path):
    """Under two megabytes after 2,000 steps with 50 domains, and 1,000 long rollouts a step."""
    run = run_without_models(f.tiny_tokenizer(), output_dir=str(tmp_path))
    domains = [f"domain {i}" for i in range(50)]
    prompts = [f.Prompt([1], "2", "teacher", domain) for domain in domains * 20]
    graded = long_rollouts(prompts, 1500)
    for run.step in (1, 2000):
        f.save_examples(run, graded, [0, 1, 998, 999])
    names = ["reverse_kl", "reverse_kl_kept", "reverse_kl_dropped", "keep_ratio",
             "filter_threshold", "response_length"]
    for metric in ("eval/exact_match", "eval/reverse_kl"):
        names.append(metric)
        names += [f"{metric}/{domain}" for domain in domains]
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, 2001):
        values = rng.normal(size=len(names))
        rows.append({"step": step} | dict(zip(names, values)))
    write_rows(tmp_path / "metrics.jsonl", rows)
    f.write_report(run)
    page = Path(tmp_path, "report.html").read_text(encoding="utf-8")
    assert len(page) < 2e6
    curves = list(parsed(page).iter("polyline"))
    assert len(curves) == 20  # at most seven in a chart
    for curve in curves:
        points = curve.get("points").split()
        assert len(points) <= 300  # a curve is 340 pixels wide
        assert points[-1].startswith("390.0,")  # and ends with the last step
    assert page.count("<circle") <= 2 * 500


def test_a_log_has_null_for_what_is_no_number_and_may_be_torn(tmp_path):
    run = run_without_models(None, output_dir=str(tmp_path))
    f.log(run, {"step": 1, "loss": math.nan, "score": -math.inf, "keep_ratio": 0.5})
    path = tmp_path / "metrics.jsonl"
    line = '{"step": 1, "loss": null, "score": null, "keep_ratio": 0.5}\n'
    assert path.read_text() == line
    path.write_text(line + '{"step": 2, "lo')  # a kill
    assert f.read_log(tmp_path) == [json.loads(line)]


def test_off_a_terminal_the_screen_is_plain_text(pair, tmp_path, capsys):
    f.main(flags(pair, tmp_path / "out", filter_percentile=40))
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert "\r" not in out
    assert err == ""
    assert max(len(line) for line in out.splitlines()) < 400
    assert "step 3/3: reverse_kl" in out
    first, second, last = log_of(tmp_path / "out")
    values = f"{first['reverse_kl']:12.3f}{last['reverse_kl']:12.3f}"
    assert f"\n{'':24}       first        last\n" in out
    assert f"\n{'reverse_kl':24}{values}\n" in out
    for verdict in ("\nkept, score", "\nDROPPED, score"):
        assert out.count(verdict) == 2  # of the first and of the last step


class Terminal:
    """A standard error that somebody is looking at."""
    written = ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text

    def flush(self):
        pass


def test_a_bar_is_for_those_who_wait(monkeypatch, capsys):
    def read():
        read = f.progress("reading", ["a", "b"])
        assert list(read) == ["a", "b"]

    read()
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    read()
    assert "reading" in terminal.written
    monkeypatch.setattr(f, "RANK", 1)
    assert not f.on_terminal()
    monkeypatch.setattr(sys, "stderr", None)  # as without a console
    assert not f.on_terminal()


def test_a_screen_that_was_closed_ends_no_run(monkeypatch):
    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    f.print0("step 1")


# --- Settings ------------------------------------------------------------------------------------

@pytest.fixture
def settings_file(tmp_path):
    """settings_file({...}) -> a command line with these settings in a JSON file, and a student and
    prompts, but no teacher."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1"}])

    def write(settings):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(settings))
        return ["--config", str(path), "--student", "s", "--prompts", prompts]

    return write


def test_the_command_line_wins_over_json_and_json_over_defaults(settings_file):
    argv = settings_file({"lr": 0.5, "seed": 7, "shard": True, "keep": 3})
    config = f.parse_config([*argv, "--teacher", "t", "--seed", "8", "--no-shard"])
    assert config.seed == 8
    assert config.shard is False
    assert config.lr == 0.5
    assert config.keep == 3
    assert config.batch_size == 64


def test_the_defaults_are_those_of_the_method(settings_file):
    config = f.parse_config(settings_file({"teacher": "t"}))
    assert config.filter_percentile == 20
    assert config.filter_by == "likelihood"
    assert config.alpha == 1
    assert config.beta == 1
    assert config.token_weights == "soft"
    assert config.loss_agg == "token-mean"
    assert config.temperature == 1
    assert config.lr == 1e-6
    assert config.weight_decay == 0.01
    assert config.max_grad_norm == 1
    assert config.rollouts_per_prompt == 1
    assert config.tiny == {}


def test_without_models_it_is_the_tiny_pair():
    config = f.parse_config(["--steps", "7"])
    assert config.steps == 7
    tiny = json.loads((HERE / "tiny_config.json").read_text())
    assert config.tiny == tiny["tiny"]
    assert config.batch_size == tiny["batch_size"]
    assert config.teacher == []


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        f.main(["--help"])
    assert stop.value.code == 0
    entries = {}
    for entry in capsys.readouterr().out.split("\n  -")[1:]:
        words = entry.split()
        entries["-" + words[0].strip(",")] = words
    for name, default in vars(f.Config()).items():
        if name == "tiny":  # of the file alone
            continue
        words = entries["--" + name.replace("_", "-")]
        assert len(words) > 2  # it says what it is
        if default not in ("", []):
            assert words[-1] == f"[{default}]"


def test_main_reads_no_command_line_but_its_own(monkeypatch, capsys):
    """In a notebook sys.argv is the kernel's."""
    monkeypatch.setattr(sys, "argv", ["python", "--not-ours"])
    with pytest.raises(SystemExit) as stop:
        f.main(["--help"])
    assert stop.value.code == 0
    assert f.parse_config().steps == 50  # that of tiny_config.json


@pytest.mark.parametrize("setting,said", [
    ({"btach_size": 3}, "btach_size"),
    ({"steps": "3x"}, "steps"),
    ({"steps": 1.5}, "steps"),
    ({"steps": True}, "steps"),
    ({"shard": "yes"}, "shard"),
    ({"shard": 1}, "shard"),
    ({"alpha": None}, "alpha must be a string or a number, got None"),
    ({"output_dir": None}, "must be a string or a number, got None"),
    ({"student": {"path": "s"}}, "student must be a string or a number"),
    ({"alpha": [1]}, "alpha"),
    ({"alpha": [1, 2]}, "alpha"),
    ({"alpha": []}, "alpha"),
    ({"alpha": math.nan}, "alpha must be in"),
    ({"loss_agg": "sum"}, "seq-mean"),
    ({"help": True}, "help"),
    ({"": True}, "settings"),
    ([1], "object"),
    (3, "object"),
    ("text", "object")], ids=str)
def test_each_value_of_a_settings_file_is_checked_as_a_flag_is(settings_file, setting, said):
    with pytest.raises(f.UserError, match=said):
        f.parse_config(settings_file(setting))


def test_a_settings_file_and_the_command_line_give_teachers_alike(settings_file):
    as_in_the_file = settings_file({"teacher": ["a=X", "b=Y"]})
    assert f.parse_config(as_in_the_file).teacher == ["a=X", "b=Y"]
    argv = settings_file({})
    for more in (["--teacher", "a=X", "b=Y"], ["--teacher", "a=X", "--teacher", "b=Y"],
                 ["--teacher=a=X", "--teacher=b=Y"]):
        assert f.parse_config([*argv, *more]).teacher == ["a=X", "b=Y"]


def test_the_command_lines_teachers_replace_the_files(settings_file):
    argv = settings_file({"teacher": ["a=X", "b=Y"]})
    assert f.parse_config([*argv, "--teacher", "t"]).teacher == ["t"]
    argv = settings_file({"teacher": "z"})
    assert f.parse_config([*argv, "--teacher", "u=v"]).teacher == ["u=v"]


def test_resume_finds_the_runs_folder_by_its_settings_file(settings_file):
    """But in a folder that holds no run it would start one, where only the settings lie."""
    argv = [*settings_file({"teacher": "t"}), "--resume"]
    assert f.parse_config([*argv, "--output-dir", "here"]).output_dir == "here"
    with pytest.raises(f.UserError, match="--resume needs the folder of the run"):
        f.parse_config(argv)
    folder = Path(argv[1]).parent
    (folder / "metrics.jsonl").write_text("")
    assert f.parse_config(argv).output_dir == str(folder)


def test_a_teacher_has_a_name_and_a_path(tmp_path, monkeypatch):
    def paths(*teachers):
        return f.teacher_paths(f.Config(teacher=list(teachers)))

    assert paths("org/model") == {"teacher": "org/model"}
    assert paths("math-7=/a=b", "code=C") == {"math-7": "/a=b", "code": "C"}
    monkeypatch.chdir(tmp_path)
    Path("runs/lr=0.1").mkdir(parents=True)
    Path("lr=0.1").mkdir()
    assert paths("runs/lr=0.1") == {"teacher": "runs/lr=0.1"}  # no name has a slash
    assert paths("lr=0.1") == {"teacher": "lr=0.1"}  # a folder that exists is no name
    assert paths("lr=0.2") == {"lr": "0.2"}
    for teachers in (["x", "y"], ["a=x", "a=y"], ["student=x"]):
        with pytest.raises(f.UserError, match="NAME=PATH of its own"):
            paths(*teachers)


# --- Prompts -------------------------------------------------------------------------------------

# Each message closes with a comma; "=" asks for an answer; 8 stands for tools, 9 for thinking.
TEMPLATE = (
    "{% for message in messages %}{{ message.content }},{% endfor %}"
    "{% if tools %}8{% endif %}"
    "{% if add_generation_prompt %}={% endif %}"
    "{% if enable_thinking %}9{% endif %}")


def chat_tokenizer(template=TEMPLATE):
    """The tiny tokenizer with a chat template."""
    tokenizer = f.tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def read(tmp_path):
    """read(rows, tokenizer, ...) -> the prompts of a file with these rows (or this text)."""

    def read(rows, tokenizer=None, teachers=("teacher",), **settings):
        path = tmp_path / "prompts.jsonl"
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            write_rows(path, rows)
        if tokenizer is None:
            tokenizer = f.tiny_tokenizer()
        return f.load_prompts(
            str(path), tokenizer, f.Config(**settings), set(range(16)), list(teachers))

    return read


def user(content):
    """A message."""
    return {"role": "user", "content": content}


def rendered(prompt):
    """A prompt's tokens as text."""
    return f.tiny_tokenizer().decode(prompt.ids)


def test_a_prompt_is_a_string_with_or_without_an_answer(read):
    a, b = read([
        {"prompt": "1+"},
        {"problem": "2+", "answer": "5", "domain": "sums"}])
    assert a == f.Prompt([1, 10], None, "teacher", "")
    assert b == f.Prompt([2, 10], "5", "teacher", "sums")


@pytest.mark.parametrize("row,answer", [
    ({"answer": 0}, "0"),
    ({"answer": 0.5}, "0.5"),
    ({"answer": "x"}, "x"),
    ({"ground_truth": "y"}, "y"),
    ({"solution": "7"}, "7"),
    ({"answer": None, "solution": "7"}, "7"),
    ({"answer": ""}, None),
    ({}, None)], ids=str)
def test_an_answer_may_be_a_number_and_have_several_names(read, row, answer):
    assert read([{"question": "1"} | row])[0].answer == answer


def test_group_is_the_old_name_of_domain(read):
    old, new, both = read([
        {"prompt": "1", "group": "g"},
        {"prompt": "1", "domain": 7},
        {"prompt": "1", "group": "g", "domain": "d"}])
    assert old.domain == "g"
    assert new.domain == "7"
    assert both.domain == "d"


def test_a_row_names_its_teacher_where_there_are_several(read):
    rows = [{"prompt": "1", "teacher": "two"}]
    assert read(rows, teachers=["one", "two"])[0].teacher == "two"
    for row in ({"prompt": "1"}, {"prompt": "1", "teacher": "three"}):
        with pytest.raises(f.UserError, match="line 1: teacher .* is not one of one, two"):
            read([row], teachers=["one", "two"])


def test_of_one_teacher_rows_need_not_know_the_name(read):
    assert read([{"prompt": "1"}], teachers=["math"])[0].teacher == "math"


@pytest.mark.parametrize("row,text", [
    ({"prompt": "1"}, "1,="),
    ({"prompt": [user("1"), user("4")]}, "1,4,="),
    ({"messages": [user("4")]}, "4,="),
    ({"messages": json.dumps([user("4")])}, "4,=")], ids=str)
def test_a_prompt_goes_through_the_chat_template(read, row, text):
    [prompt] = read([row], chat_tokenizer())
    assert rendered(prompt) == text


def test_without_a_chat_template_a_string_stays_as_it_is(read):
    [prompt] = read([{"prompt": "1"}], chat_tokenizer(), chat_template="none")
    assert rendered(prompt) == "1"
    for row in ({"prompt": [user("1")]}, {"prompt": "1", "tools": ["x"]}):
        with pytest.raises(f.UserError, match="line 1.*need a chat template"):
            read([row])


def test_thinking_is_passed_on_to_the_template(read):
    [prompt] = read([{"prompt": "1"}], chat_tokenizer(), enable_thinking=True)
    assert rendered(prompt) == "1,=9"


def test_the_assistants_last_message_is_dropped(read):
    """A row of a fine-tuning set ends with the reply that the student is to write itself."""
    five = {"role": "assistant", "content": "5"}
    rows = [
        {"messages": [user("4"), five]},
        {"messages": [user("4"), five, user("6")]},
        {"messages": [user("4"), five, user("6"), five]}]
    texts = [rendered(prompt) for prompt in read(rows, chat_tokenizer())]
    assert texts == ["4,=", "4,5,6,=", "4,5,6,="]


def test_the_text_parts_of_a_message_are_joined(read):
    content = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    [prompt] = read([{"prompt": [user(content)]}], chat_tokenizer())
    assert rendered(prompt) == "42,="


def test_a_part_that_is_no_text_is_refused(read):
    with pytest.raises(f.UserError, match="line 1"):
        read([{"prompt": [user([{"type": "image"}])]}], chat_tokenizer())


# Of each tool its number of keys: so many are left of it.
KEYS_OF_TOOLS = "{{ messages[0].content }},{% for tool in tools %}{{ tool | length }}{% endfor %}"


@pytest.mark.parametrize("tools,text", [
    ([{"name": "x"}], "1,1"),
    ([{"name": "x", "a": None}, {"name": "y", "a": 2}], "1,12"),
    ('[{"name": "x", "a": "y"}]', "1,2")], ids=str)
def test_tools_are_passed_to_the_template_without_their_nulls(read, tools, text):
    """Data sets keep them as a list, each with all keys that any of them has, or as a string."""
    [prompt] = read([{"prompt": "1", "tools": tools}], chat_tokenizer(KEYS_OF_TOOLS))
    assert rendered(prompt) == text


def test_a_byte_order_mark_is_no_text(read):
    [prompt] = read(b'\xef\xbb\xbf{"prompt": "1"}\n')
    assert rendered(prompt) == "1"


def test_only_a_line_feed_ends_a_line(read):
    rows = '{"prompt": "1", "answer": "a\u2028b\x85c"}\r\n\r\n{"prompt": "2"}'
    first, second = read(rows.encode())
    assert first.answer == "a\u2028b\x85c"
    assert rendered(second) == "2"


class ClosingTokenizer:
    """It opens every text with 1 and closes it with 2, as Llama's does and T5's."""
    chat_template = None
    bos_token_id, eos_token_id, eos_token = 1, 2, "</s>"

    def __call__(self, text, verbose):
        ids = [1]
        if text.startswith("<s>"):
            ids.append(1)
        ids.append(5)
        if text.endswith("</s>"):
            ids.append(2)
        return {"input_ids": [*ids, 2]}


@pytest.mark.parametrize("text,ids", [
    ("x", [1, 5]),  # the student is to go on with it: it is not closed
    ("<s>x", [1, 5]),  # the text brought its opening along
    ("x</s>", [1, 5, 2, 2])])  # it was to be closed
def test_special_tokens_are_neither_doubled_nor_close_a_prompt(text, ids):
    assert f.tokenize(text, ClosingTokenizer(), f.Config()) == ids


def test_columns_that_are_not_read_are_named_once(read, capsys):
    rows = [
        {"prompt": "1", "images": [], "extra": 3},
        {"prompt": "2", "extra": 4, "empty": None}]
    read(rows * 3)
    out = capsys.readouterr().out
    assert out.count("columns that are not read: ['extra', 'images']") == 1
    assert out.count("warning") == 1
    known = {"prompt": "1", "answer": "2", "teacher": "teacher", "domain": "d", "tools": None}
    read([known])
    assert "warning" not in capsys.readouterr().out


def test_longer_prompts_are_dropped_and_counted(read, capsys):
    rows = [{"prompt": digits} for digits in ("123", "1234", "12345", "123456")]
    assert len(read(rows, max_prompt_tokens=4)) == 2
    out = capsys.readouterr().out
    assert "2 prompts of at most 4 tokens" in out
    assert ": 2 longer prompts are dropped" in out
    with pytest.raises(f.UserError, match="of 4 prompts 0 have at most .*-tokens 2; raise it"):
        read(rows, max_prompt_tokens=2)


def test_a_template_that_loses_the_text_is_refused(read):
    """Some templates render only lists of parts, and of a string nothing, without a word."""
    parts_only = (
        "{% for message in messages %}{% for part in message.content %}{{ part.text }}"
        "{% endfor %}{% endfor %}=")
    rows = [{"prompt": "12"}, {"prompt": "3"}, {"prompt": "4"}]
    with pytest.raises(f.UserError, match="line 1 and 2 more: .* loses it"):
        read(rows, chat_tokenizer(parts_only))


def test_a_line_whose_text_is_lost_is_named(read, capsys):
    """The tiny tokenizer has no letters."""
    read([{"prompt": "1"}, {"prompt": "2 apples"}, {"prompt": "3"}])
    assert "lines that lose some of their text as tokens: [2]" in capsys.readouterr().out


@pytest.mark.parametrize("prompt,decoded,lost", [
    ("What  is\n1 + 1?", "<|user|>what is 1 + 1?<|end|>", False),  # case and runs of spaces
    ("\uff11", "1", False),  # another form of Unicode
    ("What is 1+1?", "Whatis1+1?", True),
    ("What is 1+1?", "<|user|><|end|>", True)])
def test_a_tokenizer_may_change_case_and_spaces_but_lose_nothing(prompt, decoded, lost):
    tokenizer = HostileTokenizer()
    tokenizer.decode = lambda ids: decoded
    assert f.is_lost({"prompt": prompt}, [], tokenizer) is lost
    system = {"role": "system", "content": "it is not looked at"}
    assert f.is_lost({"messages": [system, user(prompt)]}, [], tokenizer) is lost


def test_a_token_that_a_model_does_not_know_is_refused(tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "12"}, {"prompt": "17"}])
    known = set(range(7))
    with pytest.raises(f.UserError, match=r"line 2: its tokens \['7'\] are not known to all"):
        f.load_prompts(path, f.tiny_tokenizer(), f.Config(), known, ["teacher"])


# --- Models --------------------------------------------------------------------------------------

class Vocabulary:
    """A tokenizer's, written as a sentence: "a b _ c" has no token 2. Tokens in <> are special."""

    def __init__(self, sentence):
        self.words, self.added_tokens_decoder = {}, {}
        for i, word in enumerate(sentence.split()):
            if word != "_":
                self.words[i] = word
            if word.startswith("<"):
                self.added_tokens_decoder[i] = word

    def get_vocab(self):
        return {word: i for i, word in self.words.items()}


def source(sentence, rows=99, name="teacher"):
    """A checkpoint with such a vocabulary and so many rows in its embedding."""
    config = Qwen3Config(**SMALL | {"vocab_size": rows})
    return f.Source(name, Path("folder"), config, Vocabulary(sentence))


VOCABULARIES = {
    "the same": (source("a b c"), source("a b c"), {0, 1, 2}),
    "a longer teacher": (source("a b c"), source("a b c d e"), {0, 1, 2}),
    "a longer student": (source("a b c d e"), source("a b c"), {0, 1, 2}),
    "the student has a gap": (source("a _ c"), source("a b c"), {0, 2}),
    "the teacher has a gap": (source("a b c"), source("a _ c"), {0, 2}),
    "the student has fewer embeddings": (source("a b c", rows=2), source("a b c"), {0, 1}),
    "the teacher has fewer embeddings": (source("a b c"), source("a b c", rows=2), {0, 1}),
    "a reserved token was renamed": (source("a <x> c"), source("a <y> c"), {0, 2}),
}


@pytest.mark.parametrize("student,teacher,shared", VOCABULARIES.values(), ids=VOCABULARIES)
def test_what_all_models_take_for_the_same_token_is_shared(student, teacher, shared, capsys):
    assert f.shared_vocabulary(student, [teacher]) == shared
    left_out = len(student.tokenizer.words) - len(shared)
    warning = f"warning: vocabulary: {left_out} ids of the student are left out"
    assert (warning in capsys.readouterr().out) is (left_out > 0)


def test_each_of_several_teachers_narrows_the_vocabulary():
    teachers = [source("a b c _"), source("a _ c d e"), source("a b c <z>")]
    assert f.shared_vocabulary(source("a b c <d> e"), teachers) == {0, 2}


@pytest.mark.parametrize("student,teacher,said", [
    ("a b c", "a x c", r"1 of the student's 3 ids differ: \[\(1, 'b', 'x'\)\]"),
    ("a b c", "b a c", "2 of the student's 3 ids differ"),
    ("<x> b", "a b", "1 of the student's 2 ids differ"),  # an ordinary token of the teacher
    ("a _", "_ a", "0 of the student's 1 ids differ")])  # none is left
def test_an_ordinary_token_of_another_name_is_refused(student, teacher, said):
    with pytest.raises(f.UserError, match="teacher t: " + said):
        f.shared_vocabulary(source(student), [source(teacher, name="t")])


def edit(path, old, new):
    """Replace text in a file, which must have it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def a_copy(pair, tmp_path):
    """a_copy("student") -> a copy of this folder of the pair, to be changed."""

    def copied(name):
        return Path(shutil.copytree(pair / name, tmp_path / name))

    return copied


def test_an_end_of_sequence_that_is_not_shared_is_refused(pair, tmp_path, a_copy):
    """The student could never end."""
    teacher = a_copy("teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        edit(teacher / name, "<eos>", "<end>")
    with pytest.raises(f.UserError, match=r"its end of sequence \[14\] is not in the vocabulary"):
        loaded(pair, tmp_path / "out", teacher=teacher)


def test_a_tokenizer_may_be_longer_than_the_embedding(pair, tmp_path, a_copy, capsys):
    student = a_copy("student")
    edit(student / "tokenizer.json", '"<unk>": 15', '"<unk>": 15, "Q": 20')  # of 20 rows
    run = loaded(pair, tmp_path / "out", student=student)
    out = capsys.readouterr().out
    assert "vocabulary: 16 ids are sampled and graded" in out
    assert "1 ids of the student are left out" in out
    assert run.student.vocabulary_bias.shape == (20,)


def test_an_id_that_is_not_shared_is_never_sampled_nor_graded(pair, tmp_path):
    run = loaded(pair, tmp_path / "out")
    vocabulary = set(range(16)) - {3, 7}
    policy = f.Policy(run.student.model, {14}, vocabulary, run.config)
    uniforms = f.stateless_uniforms((0, 9), range(400), 3)
    tokens, log_probs, entropy = policy.sample([[1, 2]] * 400, uniforms)
    assert set(tokens.flatten().tolist()) <= vocabulary  # no 3, no 7, no row of padding
    prompts = [f.Prompt([1, 2], None, "teacher", "")] * 400
    rollouts = f.lay_out(prompts, {14}, tokens, log_probs, entropy)
    with torch.no_grad():
        scored, scored_entropy = policy(rollouts.ids, rollouts.mask)
    torch.testing.assert_close(scored, rollouts.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored_entropy, rollouts.student_entropy, rtol=1e-4, atol=1e-5)
    scored, _ = policy(rollouts.ids, rollouts.mask)
    scored.sum().backward()
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("template,ends", [
    ("{{ m.content }}<pad>", {13, 14}),
    ("{{ m.content }}\n<pad>", {13, 14}),
    (" {{ m.content }} <pad>\n", {13, 14}),
    ("{{ m.content }}<pad><unk>", {13, 14}),  # the first of them
    ("{{ m.content }}+", {14}),  # an ordinary token ends nothing
    ("{{ m.content }}", {14}),
    ("{{ m.no.such.thing }}", {14})])  # a template without replies
def test_the_templates_end_of_turn_ends_a_response(pair, template, ends):
    model = Qwen3ForCausalLM.from_pretrained(pair / "student")
    tokenizer = chat_tokenizer("{% for m in messages %}" + template + "{% endfor %}")
    assert f.end_ids(model, tokenizer, f.Config()) == ends
    assert f.end_ids(model, tokenizer, f.Config(chat_template="none")) == {14}


def test_all_that_a_checkpoint_lists_ends_a_response(pair):
    model = Qwen3ForCausalLM.from_pretrained(pair / "student")
    model.generation_config.eos_token_id = [3, 5]
    model.config.eos_token_id = None
    tokenizer = f.tiny_tokenizer()  # its own is 14
    assert f.end_ids(model, tokenizer, f.Config()) == {3, 5, 14}


def test_a_model_without_an_end_of_sequence_is_warned_about(pair, tmp_path, a_copy, capsys):
    student = a_copy("student")
    for name in ("config.json", "generation_config.json"):
        edit(student / name, '"eos_token_id": 14', '"eos_token_id": null')
    edit(student / "tokenizer_config.json", '"eos_token": "<eos>"', '"eos_token": null')
    loaded(pair, tmp_path / "out", student=student)
    out = capsys.readouterr().out
    assert "warning: student has no end of sequence: responses end at --max-new-tokens" in out


def test_teachers_that_end_elsewhere_are_warned_about(pair, tmp_path, a_copy, capsys):
    teacher = a_copy("teacher")
    for name in ("config.json", "generation_config.json"):
        edit(teacher / name, '"eos_token_id": 14', '"eos_token_id": 3')
    loaded(pair, tmp_path / "out", teacher=teacher)
    assert "warning: teacher and the student differ in their end" in capsys.readouterr().out
    loaded(pair, tmp_path / "other")
    assert "warning" not in capsys.readouterr().out


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
    "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
    "long_factor": [8.0] * 8, "original_max_position_embeddings": 48}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def rotary(rope):
    """A model for 64 positions before they are scaled."""
    return Qwen3Config(**SMALL, head_dim=16, max_position_embeddings=64, rope_parameters=rope)


def by_layer(full, sliding):
    """One with rotary positions of two kinds, for the layers of each kind."""
    return transformers.Gemma3TextConfig(
        max_position_embeddings=64,
        rope_parameters={"full_attention": full, "sliding_attention": sliding})


@pytest.mark.parametrize("config,limit", [
    (rotary(PLAIN), 64),
    (rotary(YARN), 128),  # 4 * 32
    (rotary(LONG), 48),  # beyond, a long row would change the positions of the short ones
    (rotary(DYNAMIC), 64),
    (by_layer(YARN, PLAIN), 128),
    (by_layer(DYNAMIC, PLAIN), 64),
    (by_layer(PLAIN, LONG), 48),
    (transformers.GPT2Config(n_positions=64), 64),
    (transformers.MptConfig(max_seq_len=64), 64),
    (transformers.Gemma3Config(text_config={"max_position_embeddings": 64}), 64)],
    ids=["plain", "yarn", "longrope", "dynamic", "yarn in some layers", "dynamic in some layers",
         "longrope in some layers", "absolute", "max_seq_len", "text of a vision model"])
def test_positions_end_where_their_scaling_does(config, limit):
    checkpoint = f.Source("student", Path("folder"), config, None)
    f.check_positions(checkpoint, limit)
    with pytest.raises(f.UserError, match=f"{limit + 1} tokens, its positions end at {limit};"):
        f.check_positions(checkpoint, limit + 1)


def test_a_model_without_a_limit_has_no_end_of_positions():
    checkpoint = f.Source("student", Path("folder"), transformers.BloomConfig(), None)
    f.check_positions(checkpoint, 10**6)


def test_of_a_hub_repository_only_what_is_loaded_is_downloaded(pair, monkeypatch):
    """Others hold each checkpoint several times: of Mistral consolidated, of gpt-oss original."""
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(pair / "student")

    monkeypatch.setattr(f.huggingface_hub, "snapshot_download", download)
    opened = f.open_source("student", "org/model")
    assert opened.folder == pair / "student"
    assert opened.config.hidden_size == 32
    assert len(opened.tokenizer) == 16
    [(name, options)] = asked
    assert name == "org/model"
    wanted = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "merges.txt", "chat_template.jinja"]
    others = [
        "consolidated.safetensors", "consolidated-00001-of-00002.safetensors",
        "original/model.safetensors", "original/config.json", "checkpoint-100/model.safetensors",
        "pytorch_model.bin", "tf_model.h5", "model.gguf", "onnx/model.onnx", "README.md"]
    found = f.huggingface_hub.utils.filter_repo_objects(
        wanted + others, allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"])
    assert list(found) == wanted


def test_a_folder_is_not_looked_up_on_the_hub(pair, monkeypatch):
    monkeypatch.setattr(f.huggingface_hub, "snapshot_download", None)
    assert f.open_source("student", str(pair / "student")).folder == pair / "student"


def test_a_download_that_fails_is_one_line(monkeypatch):
    def download(name, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(f.huggingface_hub, "snapshot_download", download)
    said = "teacher org/model: ConnectionError: no network; no such folder"
    with pytest.raises(f.UserError, match=said):
        f.open_source("teacher", "org/model")


def test_an_adapter_is_refused(a_copy):
    folder = a_copy("student")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(f.UserError, match="this is a LoRA adapter: merge it"):
        f.open_source("student", folder)


@pytest.mark.parametrize("key", [
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"])
def test_a_model_that_says_that_it_scales_its_logits_is_refused(a_copy, key):
    folder = a_copy("student")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for harmless in (1, 1.0, None):
        path.write_text(json.dumps(config | {key: harmless}))
        f.open_source("student", folder)
    path.write_text(json.dumps(config | {key: 0.5}))
    with pytest.raises(f.UserError, match=f"its {key} is not supported"):
        f.open_source("student", folder)


def capped(logits):
    """As Gemma 2's are."""
    return 2 * (logits / 2).tanh()


def halved(logits):
    """As Cohere's are."""
    return logits / 2


@pytest.mark.parametrize("change", [capped, halved])
def test_a_model_that_does_not_say_so_fails_the_self_test(pair, tmp_path, monkeypatch, change):
    forward = Qwen3ForCausalLM.forward

    @functools.wraps(forward)
    def changed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", changed)
    with pytest.raises(f.UserError, match="self-test of student: .*scales or caps its logits"):
        loaded(pair, tmp_path / "out")


def test_nan_in_the_weights_fails_the_self_test(pair, tmp_path, a_copy):
    path = a_copy("student") / "model.safetensors"
    weights = load_file(path)
    for tensor in weights.values():
        tensor.fill_(math.nan)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(f.UserError, match="self-test of student: .* NaN weights"):
        loaded(pair, tmp_path / "out", student=path.parent)


def test_a_checkpoint_with_oddities_trains_and_stops_where_training_did(pair, tmp_path, a_copy):
    """It has a weight too many, a generation config that transformers itself would not save, and
    a chat template that renders another date on another day."""
    student = a_copy("student")
    weights = load_file(student / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    (student / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.6, "eos_token_id": 14}')
    template = "{% for m in messages %}{{ m.content }}\n<pad>{% endfor %}{{ '1' }}"
    (student / "chat_template.jinja").write_text(template)
    argv = flags(pair, tmp_path / "out", student=student)
    f.main(argv)
    saved = f.checkpoints(tmp_path / "out")[-1]
    assert GenerationConfig.from_pretrained(saved).eos_token_id == [13, 14]
    edit(student / "chat_template.jinja", "'1'", "'2'")
    f.main([*argv, "--steps", "4", "--resume"])
    assert log_of(tmp_path / "out")[-1]["step"] == 4


# Models that a plain transformer is not.

def convolutions():
    """Its layers have a state of their own kind."""
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(
        **SMALL, layer_types=["conv", "full_attention"], block_multiple_of=8))


def linear_attention():
    """As Qwen3.5: in some of its layers all that was is one matrix."""
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(
        **SMALL, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"]))


def learned_positions():
    """Padding must not count in them."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        eos_token_id=14, bos_token_id=14))


def bias_in_the_head():
    """Its logits are not hidden @ W.T alone."""
    model = transformers.PhiForCausalLM(transformers.PhiConfig(
        **SMALL | {"num_key_value_heads": 2}))
    torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    return model


def eyes():
    """A vision tower, which text does not use, and sliding windows."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 16, "sliding_window": 16}, vision_config=vision,
        mm_tokens_per_image=4, image_token_index=19, boi_token_index=18, eoi_token_index=17))


def save_other_model(make, folder):
    """A random model of another kind, with the tiny tokenizer."""
    torch.manual_seed(0)
    make().save_pretrained(folder)
    f.tiny_tokenizer().save_pretrained(folder)


@slow
@pytest.mark.parametrize("make", [
    convolutions, linear_attention, learned_positions, bias_in_the_head, eyes])
def test_a_model_of_another_kind_is_at_no_distance_from_itself(
        pair, tmp_path, monkeypatch, start, make):
    """It is student and teacher: what it samples, it scores alike; on two ranks, too."""
    monkeypatch.setattr(f.Policy, "segment", 2)  # rows leave the batch and its cache often
    save_other_model(make, tmp_path / "model")
    argv = flags(
        pair, tmp_path / "out", student=tmp_path / "model", teacher=tmp_path / "model", steps=1,
        max_new_tokens=16, lr=1e-12)
    f.main(argv)
    processes = start([*argv, "--steps", "2", "--resume"], tmp_path / "log", 2)
    code, out = end(processes, tmp_path / "log")
    assert code == {0}, out
    first, second = log_of(tmp_path / "out")
    for row in (first, second):
        assert abs(row["reverse_kl"]) < 1e-5
        assert row["skipped_updates"] == 0
    if make in (convolutions, linear_attention):
        assert first["response_length"] < 16  # else no row has left the batch
    saved = weights_of(tmp_path / "out")
    assert saved.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()


def test_what_text_does_not_use_is_neither_trained_nor_lost(pair, tmp_path):
    save_other_model(eyes, tmp_path / "model")
    run = loaded(pair, tmp_path / "out", student=tmp_path / "model")
    f.train_step(run)
    f.save_checkpoint(run)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    vision = {name for name in before if "vision" in name or "multi_modal" in name}
    assert vision
    for name in before:
        unchanged = torch.equal(before[name], after[name])
        assert unchanged is (name in vision), name
    frozen = [p for p in run.student.parameters() if not p.requires_grad]
    assert len(frozen) == len(vision)  # DDP would wait for their gradients


def test_a_model_without_an_inner_model_is_refused(pair, tmp_path, monkeypatch):
    """Its logits of all tokens would be made at once."""
    monkeypatch.setattr(Qwen3ForCausalLM, "base_model_prefix", "nothing")
    with pytest.raises(f.UserError, match="Qwen3ForCausalLM has no inner model: not supported"):
        loaded(pair, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Mamba", "RecurrentGemma"])
def test_a_model_that_cannot_be_supported_is_refused_in_words(pair, tmp_path, kind):
    settings = SMALL.copy()
    del settings["initializer_range"]
    if kind == "RecurrentGemma":
        settings["block_types"] = ["recurrent", "attention"]
    config = getattr(transformers, kind + "Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    f.tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(f.UserError, match="self-test of student: .*sees padding"):
        loaded(pair, tmp_path / "out", student=tmp_path / "model")


# --- Bad input: one line, status 2, no traceback -------------------------------------------------


def refusal(argv, capfd):
    """What the program says of a bad command: one line, and not a long one."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        f.main(argv)
    error = capfd.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert len(error) <= 1000
    return error


def explained(error):
    """What is said of an error that was raised on a user's file, two calls deep."""
    with pytest.raises(f.UserError) as raised:
        with f.explain("outside", "not said"):
            with f.explain("file", "mend it"):
                raise error
    return str(raised.value)


def test_an_error_is_explained_once_and_in_one_line():
    assert explained(OSError("the disk\nis  full")) == "file: OSError: the disk is full; mend it"
    assert explained(ValueError("it is empty")) == "file: it is empty; mend it"
    assert explained(f.UserError("ready")) == "ready"
    assert len(explained(OSError("x" * 5000))) < 400


BAD_SETTINGS = {
    "text for a number": ({"steps": "many"}, "steps"),
    "fraction of a step": ({"steps": "1.5"}, "steps"),
    "negative steps": ({"steps": -1}, "steps must be in [0, 1e9]"),
    "steps beyond all folders": ({"steps": 10**6}, "at most 999999"),
    "huge number": ({"steps": "9" * 5000}, "steps"),
    "percentile over 100": ({"filter_percentile": 101}, "[0, 100]"),
    "percentile below 0": ({"filter_percentile": -1}, "[0, 100]"),
    "percentile nan": ({"filter_percentile": "nan"}, "[0, 100]"),
    "lr of zero": ({"lr": 0}, "lr must be greater than 0"),
    "lr nan": ({"lr": "nan"}, "lr must be in"),
    "lr infinite": ({"lr": "inf"}, "lr must be in"),
    "temperature 0": ({"temperature": 0}, "temperature must be greater than 0"),
    "alpha negative": ({"alpha": -0.1}, "alpha must be in"),
    "batch of zero": ({"batch_size": 0}, "batch_size must be greater than 0"),
    "batch beyond memory": ({"batch_size": 10**10}, "batch_size must be in"),
    "indivisible batch": ({"batch_size": 6, "rollouts_per_prompt": 4}, "multiple"),
    "no checkpoint to keep": ({"keep": 0}, "keep must be greater than 0"),
    "seed too large": ({"seed": 2**64}, "seed must be in"),
    "unknown choice": ({"loss_agg": "sum"}, "seq-mean"),
    "config missing": ({"config": "nowhere.json"}, "nowhere.json"),
    "config is a folder": ({"config": "/"}, "config /"),
    "prompts missing": ({"prompts": "none.jsonl"}, "none.jsonl: no such file"),
    "prompts are a folder": ({"prompts": "/proc"}, "/proc: IsADirectoryError"),
    "all prompts too long": ({"max_prompt_tokens": 2}, "of 40 prompts 0"),
    "eval prompts missing": ({"eval_prompts": "no.jsonl"}, "no.jsonl: no such file"),
    "student missing": ({"student": "./nowhere"}, "student ./nowhere"),
    "student is a file": ({"student": FILE}, "no such folder"),
    "a hub name without network": ({"student": "fire-opd/does-not-exist"}, "no such folder"),
    "teacher missing": ({"teacher": "/nowhere"}, "teacher /nowhere"),
    "teacher without a path": ({"teacher": "a="}, "no such folder"),
    "teacher twice": ({"teacher": ["a=x", "a=y"]}, "NAME=PATH of its own"),
    "resume of an evaluation": ({"resume": True, "steps": 0}, "--resume needs --steps"),
}


@pytest.mark.parametrize("settings,said", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_refused(pair, tmp_path, capfd, settings, said):
    argv = flags(pair, tmp_path / "out", **settings)
    assert said in refusal(argv, capfd)
    assert not (tmp_path / "out").exists()


BAD_COMMANDS = {
    "unknown flag": (["--stpes", "3"], "--stpes"),
    "stray word": (["hello"], "hello"),
    "two lines": (["hello\nworld"], "hello"),
    "no value": (["--lr"], "--lr"),
    "no folder to resume": (["--resume", "--output-dir", ""], "--output-dir"),
    "tiny and models": (["--config", HERE / "tiny_config.json"], "brings its own"),
}


@pytest.mark.parametrize("words,said", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_refused(pair, tmp_path, capfd, words, said):
    argv = [*flags(pair, tmp_path / "out"), *map(str, words)]
    assert said in refusal(argv, capfd)


@pytest.mark.parametrize("argv,said", [
    (["--teacher", "x"], "--student and --prompts"),
    (["--prompts", "x", "--student", "y"], "--teacher, --student"),
    (["--resume"], "--output-dir"),
    (["--eval-prompts", "x"], "tiny pair of"),
    (["--task", "lunar", "--output-dir", "out"], "mend tiny in")], ids=str)
def test_half_a_command_is_refused(capfd, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(argv, capfd)


def test_a_mistake_in_tiny_names_its_file(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["--eval-prompts", "x"], ["--task", "lunar", "--output-dir", "out"]):
        assert "tiny_config.json" in refusal(argv, capfd)


BAD_FILES = {
    "not JSON": (b"{steps: 3}", "JSONDecodeError"),
    "a list": (b"[1]", "give a JSON object"),
    "empty": (b"", "JSON"),
    "binary": (b"\xff\xfe\x00", "give a JSON object"),
    "deep": (b"[" * 10**5, "give a JSON object"),
    "unknown key": (b'{"btach_size": 3}', "btach_size"),
    "key of two lines": (b'{"a\\nb": 3}', "is not a setting"),
    "help": (b'{"help": true}', "help"),
    "wrong type": (b'{"steps": "3x"}', "steps"),
    "NaN": (b'{"alpha": NaN}', "alpha"),
    "null": (b'{"output_dir": null}', "output_dir must be"),
    "tiny without tasks": (b'{"tiny": {"tasks": 3}}', "mend tiny"),
}


@pytest.mark.parametrize("content,said", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_settings_file_is_refused(tmp_path, capfd, content, said):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    argv = ["--config", str(path), "--output-dir", str(tmp_path / "out")]
    assert said in refusal(argv, capfd)


def tiny_command(folder, **changes):
    """The command line of a run on a tiny pair that takes a moment to train."""
    task = {
        "models": {"student": "+", "a": "+"}, "mixture": {"+": 1.0}, "graded_by": {"+": "a"},
        "student_loss": 9.0}
    shape = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = {
        "digits": 3, "pretrain_lr": 1e-3, "pretrain_steps": 1, "teacher_loss": 9.0,
        "teacher": shape, "student": shape, "tasks": {"foreign": task | changes}}
    path = folder / "settings.json"
    path.write_text(json.dumps({"tiny": tiny, "max_new_tokens": 4, "batch_size": 4, "steps": 1}))
    return ["--config", str(path), "--output-dir", str(folder / "out")]


@pytest.mark.parametrize("change,said", [
    ({"mixture": None}, "NoneType"),
    ({"mixture": {"+": 0.5}}, "do not sum to 1"),
    ({"models": {"student": ""}}, "cannot be empty"),
    ({"graded_by": {}}, "KeyError: '+'"),
    ({"student_loss": "low"}, "TypeError"),
    ({"student": {"hidden_size": "wide"}}, "hidden_size")], ids=str)
def test_a_bad_tiny_task_is_refused(tmp_path, capfd, change, said):
    error = refusal(tiny_command(tmp_path, **change), capfd)
    assert error.startswith("error: task foreign: ")
    assert said in error
    assert f"mend tiny in {tmp_path / 'settings.json'}" in error
    assert list(tmp_path.glob("out/*")) == []  # nothing half made is left


@slow
def test_a_good_tiny_task_runs(tmp_path):
    """Else the refusals above could be of anything."""
    f.main(tiny_command(tmp_path))
    assert len(log_of(tmp_path / "out")) == 3  # an evaluation, a step, an evaluation


GOOD_LINE = b'{"prompt": "1+2="}\n'
BAD_PROMPTS = {
    "empty": (b"", "of 0 prompts 0"),
    "blank": (b"\n \n", "of 0 prompts 0"),
    "binary": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "line 1"),
    "not JSON": (GOOD_LINE + b"nope\n", "line 2"),
    "truncated": (GOOD_LINE + b'{"prompt": "1', "line 2"),
    "a list": (b"[1]\n", "line 1: not an object"),
    "a number": (GOOD_LINE * 2 + b"3\n", "line 3: not an object"),
    "deep JSON": (b"[" * 10**5, "line 1"),
    "invalid UTF-8": (b'{"prompt": "\xc3\x28"}\n', "line 1"),
    "lone surrogate": (b'{"prompt": "\\ud800"}\n', "line 1"),
    "no prompt": (b'{"text": "1"}\n', "line 1: no prompt"),
    "prompt empty": (b'{"prompt": ""}\n', "line 1: no prompt"),
    "prompt of no messages": (b'{"prompt": []}\n', "line 1: no prompt"),
    "prompt null": (b'{"prompt": null}\n', "line 1: no prompt"),
    "prompt a number": (b'{"prompt": 3}\n', "line 1: no prompt"),
    "messages without a template": (
        b'{"prompt": [{"role": "user", "content": "1"}]}', "need a chat template"),
    "messages no JSON": (b'{"messages": "hello"}', "line 1"),
    "answer a list": (b'{"prompt": "1", "answer": ["a"]}\n', "'answer' must be"),
    "answer a bool": (b'{"prompt": "1", "answer": false}\n', "'answer' must be"),
    "teacher unknown": (GOOD_LINE + b'{"prompt": "1", "teacher": "bob"}', "line 2: teacher 'bob'"),
}


@pytest.mark.parametrize("content,said", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_file_is_refused(pair, tmp_path, capfd, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert said in refusal(flags(pair, tmp_path / "out", prompts=path), capfd)
    assert said in refusal(flags(pair, tmp_path / "out", eval_prompts=path), capfd)
    assert not (tmp_path / "out").exists()


@slow
def test_a_huge_line_is_a_prompt_that_is_too_long(pair, tmp_path, capfd):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1" * 10**6}])
    error = refusal(flags(pair, tmp_path / "out", prompts=prompts), capfd)
    assert "of 1 prompts 0 have at most --max-prompt-tokens" in error


def test_rows_that_name_none_of_several_teachers_are_refused(pair, tmp_path, capfd):
    teachers = [f"a={pair / 'teacher'}", f"b={pair / 'other'}"]
    error = refusal(flags(pair, tmp_path / "out", teacher=teachers), capfd)
    assert "line 1: teacher None is not one of a, b" in error


BAD_TEMPLATES = {
    "renders nothing": ("{{ '' }}", '"1"', "the prompt has no tokens"),
    "raises": ("{{ raise_exception('no') }}", '"1"', "line 1: TemplateError: no"),
    "broken": ("{% if %}", '"1"', "line 1"),
    "messages are numbers": (TEMPLATE, "[3]", "line 1"),
    "messages without a role": (TEMPLATE, '[{"content": "1"}]', "line 1"),
    "a picture": (
        TEMPLATE, '[{"role": "user", "content": [{"type": "image"}]}]', "line 1"),
}


@pytest.mark.parametrize("template,prompt,said", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_prompt_that_its_template_cannot_render_is_refused(
        pair, tmp_path, capfd, a_copy, template, prompt, said):
    student = a_copy("student")
    (student / "chat_template.jinja").write_text(template)
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": {prompt}}}')
    argv = flags(pair, tmp_path / "out", student=student, prompts=path)
    assert said in refusal(argv, capfd)


# What may be wrong with a checkpoint: each is a function of its folder, or makes one.

def cut(name, share):
    """Only the first part of a file is there."""
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(share * len(content))])

    return damage


def removed(name):
    """A file is not there."""
    def damage(folder):
        (folder / name).unlink()

    return damage


def replaced(name, old, new):
    """A file says something else."""
    def damage(folder):
        edit(folder / name, old, new)

    return damage


def empty(folder):
    """It has no files."""
    shutil.rmtree(folder)
    folder.mkdir()


def adapter(folder):
    """It is a LoRA adapter beside its base model."""
    (folder / "adapter_config.json").write_text("{}")


def pickled(folder):
    """Its weights are a pickle, which may run anything."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def weights_of_nothing(folder):
    """Its weights are none of the model's."""
    weights = {"x": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_digits(folder):
    """Its vocabulary has other words for the digits."""
    path = folder / "tokenizer.json"
    path.write_text(re.sub(r'"(\d)": (\d)', r'"x\1": \2', path.read_text()))


def swapped_digits(folder):
    """In its vocabulary 3 and 4 have each other's id."""
    edit(folder / "tokenizer.json", '"3": 3', '"3": swapped')
    edit(folder / "tokenizer.json", '"4": 4', '"4": 3')
    edit(folder / "tokenizer.json", "swapped", "4")


BAD_STUDENTS = {
    "empty": (empty, "tokenizer included"),
    "config missing": (removed("config.json"), "tokenizer included"),
    "config cut": (cut("config.json", 0.5), "tokenizer included"),
    "tokenizer cut": (cut("tokenizer.json", 0.5), "tokenizer included"),
    "weights cut": (cut("model.safetensors", 0.5), "give a safetensors causal LM"),
    "weights empty": (cut("model.safetensors", 0), "give a safetensors causal LM"),
    "weights missing": (removed("model.safetensors"), "give a safetensors causal LM"),
    "weights pickled": (pickled, "give a safetensors causal LM"),
    "weights of nothing": (weights_of_nothing, "weights are missing"),
    "weights of another shape": (
        replaced("config.json", '"hidden_size": 32', '"hidden_size": 64'), "of another shape"),
    "adapter": (adapter, "LoRA"),
    "few positions": (
        replaced("config.json", '_embeddings": 32768', '_embeddings": 16'), "positions end at 16"),
    "vocabulary swapped": (swapped_digits, "2 of the student's 16 ids differ"),
    "vocabulary disjoint": (other_digits, "10 of the student's 16 ids differ"),
}


@pytest.mark.parametrize("damage,said", BAD_STUDENTS.values(), ids=BAD_STUDENTS)
def test_a_bad_checkpoint_is_refused(pair, tmp_path, capfd, a_copy, damage, said):
    student = a_copy("student")
    damage(student)
    assert said in refusal(flags(pair, tmp_path / "out", student=student), capfd)


def test_a_prompt_beyond_the_teachers_vocabulary_is_refused(pair, tmp_path, capfd, a_copy):
    student = a_copy("student")
    edit(student / "tokenizer.json", '"<unk>": 15', '"<unk>": 15, "Q": 16')
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1Q"}])
    argv = flags(pair, tmp_path / "out", student=student, prompts=prompts)
    assert "line 1: its tokens ['Q'] are not known to all models" in refusal(argv, capfd)


@pytest.mark.parametrize("name", ["a file", "a file/below", "/proc/nowhere"])
def test_a_bad_output_folder_is_refused(pair, tmp_path, capfd, name):
    (tmp_path / "a file").write_text("x")
    error = refusal(flags(pair, tmp_path / name), capfd)
    assert "error: output folder" in error
    assert "choose another --output-dir" in error
    assert (tmp_path / "a file").read_text() == "x"


def test_an_output_folder_that_holds_a_run_is_refused_and_left_alone(pair, tmp_path, capfd):
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "config.json").write_text('{"steps": 7}')
    (busy / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "it holds a run" in refusal(flags(pair, busy), capfd)
    assert sorted(path.name for path in busy.iterdir()) == ["config.json", "metrics.jsonl"]
    assert (busy / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_output_folder_with_checkpoints_is_refused(pair, tmp_path, capfd):
    """Even without a config.json: a checkpoint that is there already would not be saved again."""
    checkpoint = tmp_path / "saved" / "checkpoint-000003"
    checkpoint.mkdir(parents=True)
    assert "--resume" in refusal(flags(pair, tmp_path / "saved"), capfd)
    assert list((tmp_path / "saved").iterdir()) == [checkpoint]


@slow
def test_a_real_process_ends_with_one_line_and_status_2(pair, tmp_path):
    argv = flags(pair, tmp_path / "out", student=tmp_path / "no")
    done = subprocess.run(
        [sys.executable, str(FILE), *argv], text=True, capture_output=True, env=CPU)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: student")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- The run's folder and its checkpoints --------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    """The output folder of a run, which makes it."""
    return tmp_path / "out"


def train(pair, folder, settings={}, **changes):
    """A run that comes to its end."""
    f.main(flags(pair, folder, **settings | changes))


def status_of(pair, folder, settings={}, **changes):
    """The status of a run that does not."""
    with pytest.raises(SystemExit) as stop:
        f.main(flags(pair, folder, **settings | changes))
    return stop.value.code


def only_error(capsys):
    """What a command has written as its error: one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def in_step(number, act, monkeypatch):
    """Have `act` done in a run's step of this number."""
    train_step = f.train_step

    def step(run):
        if run.step + 1 == number:
            act()
        return train_step(run)

    monkeypatch.setattr(f, "train_step", step)


def names_in(folder):
    """The names of a run's checkpoints."""
    return [path.name for path in f.checkpoints(folder)]


def steps_in(folder):
    """The steps in a run's log."""
    return [row["step"] for row in log_of(folder) if "loss" in row]


def evaluations_in(folder):
    """The steps after which a run has evaluated."""
    return [row["step"] for row in log_of(folder) if "loss" not in row]


def read_json(path):
    """The content of a JSON file."""
    return json.loads(path.read_text())


def assert_same_run(a, b):
    """Two runs agree to the bit: in their logs, their weights and their moments."""
    assert_same_metrics(log_of(a), log_of(b), rel=0, abs=0)
    assert names_in(a)[-1] == names_in(b)[-1]
    assert_equal(weights_of(a), weights_of(b))
    ours, theirs = moments_of(a), moments_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name])


@pytest.fixture(scope="session")
def whole(pair, tmp_path_factory):
    """The folder of a run of three steps that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(pair, folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_the_saved_student_is_the_trained_one_and_loads_with_transformers(pair, tmp_path, tied):
    save_model(tmp_path / "student", 5, tie_word_embeddings=tied)
    run = loaded(pair, tmp_path / "out", student=tmp_path / "student")
    f.train_step(run)
    run.step = 1
    f.save_checkpoint(run)
    assert ("lm_head.weight" in weights_of(tmp_path / "out")) is not tied
    folder = f.checkpoints(tmp_path / "out")[0]
    ids = torch.tensor([[1, 2, 10, 12]])
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, run.student.model(ids).logits)
    pipeline = transformers.pipeline("text-generation", str(folder))
    output = pipeline("12+=", min_new_tokens=5, max_new_tokens=5)
    text = output[0]["generated_text"]
    assert text.startswith("12+=")
    assert len(text) > len("12+=")


def test_only_weights_are_safetensors(whole):
    """Servers load every .safetensors of a folder as weights: the optimizer must not be one."""
    folder = f.checkpoints(whole)[0]
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "optimizer.pt").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_have_the_mode_that_the_umask_gives(pair, out, umask):
    """safetensors by itself writes weights that only their owner can read, and serve."""
    before = os.umask(umask)
    try:
        train(pair, out, steps=1)
    finally:
        os.umask(before)
    folder = f.checkpoints(out)[0]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


SMALL_FILES = (
    "LICENSE", "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json")


def save_old_student(folder, tied):
    """A student as transformers 4 wrote it, among files that only others read."""
    save_model(folder, 5, tie_word_embeddings=tied)
    config = read_json(folder / "config.json")
    del config["rope_parameters"]
    config["rope_theta"] = 1000000
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    settings = read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"\n\x07SentencePiece\xff")
    (folder / "pytorch_model.bin").write_bytes(b"the weights in another format")


@pytest.mark.parametrize("tied", [True, False])
def test_the_students_small_files_come_along_byte_for_byte(pair, tmp_path, out, tied):
    """So that other programs, and older versions of transformers, read there what they read in the
    student's own; also in the checkpoints of a resumed run, after the student's folder is gone."""
    student = tmp_path / "student"
    save_old_student(student, tied)
    before = {name: (student / name).read_bytes() for name in SMALL_FILES}
    train(pair, out, student=student, steps=1)
    shutil.rmtree(student)
    train(pair, out, student=student, steps=2, resume=True)
    assert names_in(out) == ["checkpoint-000001", "checkpoint-000002"]
    for folder in f.checkpoints(out):
        for name in SMALL_FILES:
            assert (folder / name).read_bytes() == before[name], name
        assert not (folder / "pytorch_model.bin").exists()
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.rope_parameters["rope_theta"] == 1000000


@pytest.mark.parametrize("before,after", [
    ({"eos_token_id": 14, "top_k": 7}, {"eos_token_id": [13, 14], "top_k": 7}),
    ({"eos_token_id": [3]}, {"eos_token_id": [3, 13, 14]}),
    (None, {"eos_token_id": [13, 14]}),
])
def test_the_generation_config_is_kept_and_lists_every_end(pair, tmp_path, out, before, after):
    """Others stop where rollouts did: here at <eos>, 14, and at the template's <pad>, 13."""
    student = tmp_path / "student"
    shutil.copytree(pair / "student", student)
    template = "{% for message in messages %}{{ message.content }}<pad>{% endfor %}"
    (student / "chat_template.jinja").write_text(template)
    (student / "generation_config.json").unlink()
    if before is not None:
        (student / "generation_config.json").write_text(json.dumps(before))
    train(pair, out, student=student, steps=1)
    train(pair, out, student=student, steps=2, resume=True)
    assert names_in(out) == ["checkpoint-000001", "checkpoint-000002"]
    for folder in f.checkpoints(out):
        assert read_json(folder / "generation_config.json") == after


def test_a_generation_config_that_is_no_json_is_one_line(pair, tmp_path, out, capsys):
    """transformers loads such a student all the same."""
    student = tmp_path / "student"
    shutil.copytree(pair / "student", student)
    (student / "generation_config.json").write_text('{"do_sample": ')
    assert status_of(pair, out, student=student) == 2
    assert "student" in only_error(capsys)


@pytest.mark.parametrize("keep,left", [
    (1, ["checkpoint-000004"]),
    (2, ["checkpoint-000003", "checkpoint-000004"]),
])
def test_the_newest_checkpoints_are_kept(pair, out, keep, left):
    (out / "checkpoint-backup").mkdir(parents=True)  # a user's own, which is none of them
    train(pair, out, steps=4, save_every=1, keep=keep)
    assert names_in(out) == left
    assert (out / "checkpoint-backup").exists()


def full_after_one_checkpoint(function, folder):
    """The same function, on a disk that is full as soon as the folder has a checkpoint."""

    @functools.wraps(function)
    def write(*args, **kwargs):
        result = function(*args, **kwargs)
        if f.checkpoints(folder):
            raise OSError(28, "No space left on device")
        return result

    return write


@pytest.mark.parametrize("owner,name", [
    (Qwen3ForCausalLM, "save_pretrained"), (torch, "save"), (os, "fsync")])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_intact(
        pair, whole, out, capsys, monkeypatch, owner, name):
    """And no part of the new one, which would keep the disk full."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_after_one_checkpoint(getattr(owner, name), out))
        assert status_of(pair, out, save_every=1) == 2
    error = only_error(capsys)
    assert "No space left on device" in error
    assert "make room and --resume" in error
    assert names_in(out) == ["checkpoint-000001"]
    assert list(out.glob("*.partial")) == []
    train(pair, out, save_every=1, resume=True)
    assert_same_run(whole, out)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_log_on_a_full_disk_is_one_line(pair, out, capsys, monkeypatch):
    def fill_the_disk():
        (out / "metrics.jsonl").unlink()
        (out / "metrics.jsonl").symlink_to("/dev/full")

    in_step(2, fill_the_disk, monkeypatch)
    assert status_of(pair, out) == 2
    error = only_error(capsys)
    assert "metrics.jsonl" in error
    assert "No space left on device" in error
    assert "make room and --resume" in error


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it(pair, out, monkeypatch):
    """It loses its name first. What is left of it goes when the run is resumed."""
    settings = {"steps": 4, "save_every": 1, "keep": 1}

    def killed(folder, ignore_errors):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(pair, out, settings)
    assert names_in(out) == ["checkpoint-000002"]
    assert [path.name for path in out.glob("*.partial")] == ["checkpoint-000001.partial"]
    train(pair, out, settings, resume=True)
    assert names_in(out) == ["checkpoint-000004"]
    assert list(out.glob("*.partial")) == []


def test_a_checkpoint_that_a_kill_has_left_half_written_goes_at_the_start(pair, out):
    half = out / "checkpoint-000002-1a2b.partial"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    train(pair, out)
    assert not half.exists()


def test_a_file_system_that_cannot_rename_folders_is_named_before_any_work(
        pair, tmp_path, capsys, monkeypatch):
    """As a mounted bucket cannot: there all training would be lost at the first save."""
    out = tmp_path / ("a-folder-with-a-long-name" * 6)  # which must not push the reason out
    rename = os.rename

    def rename_files_only(source, target):
        if os.path.isdir(source):
            raise OSError(38, "Function not implemented", source, None, target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename_files_only)
        patch.setattr(f, "load_policy", None)  # is not even called
        assert status_of(pair, out) == 2
    error = only_error(capsys)
    assert "Function not implemented" in error
    assert "choose another --output-dir" in error
    assert list(out.iterdir()) == []  # no config.json: the folder is not taken
    train(pair, out)


def test_a_run_does_without_what_windows_lacks(pair, out, monkeypatch):
    for name in ("sync", "sysconf", "sysconf_names", "getuid"):
        monkeypatch.delattr(os, name)
    for name in ("SIGHUP", "SIGUSR1"):
        monkeypatch.delattr(signal, name)
    train(pair, out)
    assert names_in(out) == ["checkpoint-000003"]


def test_runs_without_an_output_folder_get_one_each(pair, tmp_path, monkeypatch):
    """Also if they are started in the same second."""

    def one_second(format):
        return "runs/20260101-120000-"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", one_second)
    train(pair, "", steps=1)
    train(pair, "", steps=1)
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.startswith("20260101-120000-")
        assert names_in(folder) == ["checkpoint-000001"]


def test_a_folder_that_holds_a_run_is_not_taken_by_another(pair, whole, out, capsys):
    shutil.copytree(whole, out)
    assert status_of(pair, out, steps=9) == 2
    assert "it holds a run; continue it with --resume" in only_error(capsys)
    assert_same_run(whole, out)


def test_a_run_that_does_not_get_to_start_leaves_its_folder_free(pair, tmp_path, out, capsys):
    """After the mistake is mended, the same command is no resumption."""
    teacher = tmp_path / "teacher"
    shutil.copytree(pair / "teacher", teacher)
    (teacher / "model.safetensors").write_bytes(b"")
    assert status_of(pair, out, teacher=teacher) == 2
    assert "teacher" in only_error(capsys)
    assert list(out.iterdir()) == []
    shutil.copy(pair / "teacher" / "model.safetensors", teacher)
    train(pair, out, teacher=teacher)
    assert steps_in(out) == [1, 2, 3]


@slow
def test_of_two_runs_that_start_at_once_in_one_folder_one_is_refused(pair, tmp_path, out, start):
    argv = flags(pair, out, steps=20)
    first = start(argv, tmp_path / "first")
    second = start(argv, tmp_path / "second")
    codes, text = end(first, tmp_path / "first")
    other_codes, other_text = end(second, tmp_path / "second")
    text += other_text
    assert codes | other_codes == {0, 2}, text
    assert text.count("error: output folder") == 1
    assert steps_in(out) == list(range(1, 21))


# --- A resumed run is the same run ---------------------------------------------------------------


def busy(pair):
    """Settings with a checkpoint after each step and an evaluation after each second one."""
    return {"steps": 4, "save_every": 1, "keep": 9, "eval_every": 2,
            "eval_prompts": pair / "prompts.jsonl"}


@pytest.fixture(scope="session")
def busy_whole(pair, tmp_path_factory):
    """The folder of such a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("busy") / "run"
    train(pair, folder, busy(pair))
    return folder


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(pair, busy_whole, out):
    """Nothing of it is left to chance: what is sampled, and in what order prompts come, is a
    function of the seed and the step."""
    train(pair, out, busy(pair), steps=2)
    train(pair, out, busy(pair), resume=True)
    assert_same_run(busy_whole, out)


def test_a_resumed_run_with_two_rollouts_of_each_prompt_is_the_same(pair, tmp_path, out):
    settings = {"rollouts_per_prompt": 2}
    train(pair, tmp_path / "whole", settings)
    train(pair, out, settings, steps=1)
    train(pair, out, settings, resume=True)
    assert_same_run(tmp_path / "whole", out)


def test_resuming_makes_good_what_a_kill_has_left_of_the_log(pair, busy_whole, out):
    """A kill after the save of step 2 loses the evaluation that was to follow it, one in step 4
    leaves rows of steps that were not saved, and half a line."""
    train(pair, out, busy(pair), steps=2)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval/reverse_kl" in lines[-1]
    lines[-1] = '{"step": 3, "loss": 1}\n{"step": 4, "lo'
    (out / "metrics.jsonl").write_text("".join(lines))
    train(pair, out, busy(pair), resume=True)
    assert_same_run(busy_whole, out)


def test_resuming_a_finished_run_does_nothing(pair, busy_whole, out, capsys):
    shutil.copytree(busy_whole, out)
    log = (out / "metrics.jsonl").read_bytes()
    weights = f.checkpoints(out)[-1] / "model.safetensors"
    saved_at = weights.stat().st_mtime_ns
    train(pair, out, busy(pair), resume=True)
    text = capsys.readouterr().out
    assert "evaluation" not in text
    assert "4 of 4 steps" in text
    assert (out / "metrics.jsonl").read_bytes() == log
    assert weights.stat().st_mtime_ns == saved_at


def test_a_run_that_has_done_more_steps_than_asked_for_is_finished(pair, whole, out):
    shutil.copytree(whole, out)
    train(pair, out, steps=2, resume=True)
    assert_same_run(whole, out)


def test_resume_with_nothing_to_resume_starts_the_run(pair, whole, out):
    """So a job that may be requeued has one command."""
    train(pair, out, resume=True)
    assert_same_run(whole, out)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(pair, whole, out, monkeypatch):
    def die():
        raise ZeroDivisionError("a fault of ours is no mistake of the user's")

    with monkeypatch.context() as patch:
        in_step(3, die, patch)
        with pytest.raises(ZeroDivisionError):
            train(pair, out)
    assert steps_in(out) == [1, 2]
    train(pair, out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.parametrize("damage", ["nothing", "cut short", "overwritten"])
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_one_line(pair, busy_whole, out, capsys, name, damage):
    """Of a disk that went bad, say: a kill leaves none. The one before is there to go on from."""
    shutil.copytree(busy_whole, out)
    folder = f.checkpoints(out)[-1]
    content = (folder / name).read_bytes()
    left = {"nothing": b"", "cut short": content[:100], "overwritten": b"x" * len(content)}
    (folder / name).write_bytes(left[damage])
    assert status_of(pair, out, busy(pair), resume=True) == 2
    error = only_error(capsys)
    assert "checkpoint-000004" in error
    if name == "optimizer.pt":
        assert "remove this folder to continue the one before it" in error
    shutil.rmtree(folder)
    train(pair, out, busy(pair), resume=True)
    assert_same_run(busy_whole, out)


def test_a_setting_that_is_newer_than_the_run_had_its_default(pair, whole, out, capsys):
    shutil.copytree(whole, out)
    settings = read_json(out / "config.json")
    del settings["token_weights"]
    (out / "config.json").write_text(json.dumps(settings))
    assert status_of(pair, out, steps=4, resume=True, token_weights="hard") == 2
    assert "token_weights was 'soft', is 'hard'" in only_error(capsys)
    train(pair, out, steps=4, resume=True)


@pytest.mark.parametrize("name,value", [
    ("lr", 0.5),
    ("batch_size", 12),
    ("seed", 1),
    ("alpha", 0),
    ("dtype", "bfloat16"),
    ("student", "other"),
    ("teacher", "other"),
    ("token_weights", "hard"),
    ("max_new_tokens", 11),
])
def test_a_run_is_not_resumed_with_other_settings(pair, whole, out, capsys, name, value):
    shutil.copytree(whole, out)
    if value == "other":
        value = pair / "other"
    changed = {"steps": 4, "resume": True, name: value}
    assert status_of(pair, out, changed) == 2
    error = only_error(capsys)
    assert f"{name} was " in error
    assert f"{value}" in error
    assert "only steps, eval_every, " in error
    assert_same_run(whole, out)


def test_what_may_change_on_resume_changes_no_result_but_by_rounding(pair, whole, out):
    changed = {"steps": 3, "eval_every": 1, "save_every": 1, "keep": 1, "rollout_batch_size": 4,
               "micro_batch_tokens": 30, "gradient_checkpointing": True, "shard": True}
    assert {*changed, "compile"} == set(f.MAY_CHANGE)
    train(pair, out, steps=1)
    train(pair, out, changed, resume=True)
    assert names_in(out) == ["checkpoint-000003"]
    assert_same_metrics(log_of(whole), log_of(out), rel=1e-3, abs=1e-4)


def go_on(folder, steps):
    """The command that the summary of a run suggests."""
    f.main(["--config", str(folder / "config.json"), "--resume", "--steps", str(steps)])


def test_a_copied_run_goes_on_where_the_copy_lies(pair, whole, tmp_path, out):
    train(pair, out, steps=2)
    shutil.copytree(out, tmp_path / "copy")
    files = [path for path in out.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    go_on(tmp_path / "copy", 3)
    assert_same_run(whole, tmp_path / "copy")
    assert [path.read_bytes() for path in files] == before
    assert names_in(out) == ["checkpoint-000002"]


def test_a_moved_run_goes_on_where_it_lies(pair, whole, tmp_path, out):
    train(pair, out, steps=2)
    out.rename(tmp_path / "moved")
    go_on(tmp_path / "moved", 3)
    assert_same_run(whole, tmp_path / "moved")
    assert not out.exists()


@slow
def test_a_tiny_run_takes_its_pair_along_when_it_is_moved(tmp_path, out, capsys):
    settings = read_json(HERE / "tiny_config.json")
    settings["batch_size"] = 8
    settings["tiny"]["pretrain_steps"] = 1
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    f.main(["--config", str(tmp_path / "tiny.json"), "--steps", "1", "--output-dir", str(out)])
    assert "the tiny student:" in capsys.readouterr().out
    out.rename(tmp_path / "moved")
    go_on(tmp_path / "moved", 2)
    assert "the tiny student:" not in capsys.readouterr().out  # it is not made again
    assert steps_in(tmp_path / "moved") == [1, 2]
    assert not out.exists()


# --- Stopping, and the process around a run ------------------------------------------------------


STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def unhandled(number, frame):
    """A signal that no run has handled fails the test, where it would end all tests."""
    raise AssertionError(f"signal {number} has reached the process around the run")


@pytest.fixture
def handlers():
    """The process around a run has handlers of its own."""
    before = {}
    for name in STOPPING:
        number = getattr(signal, name)
        before[number] = signal.signal(number, unhandled)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name,times", [
    ("SIGINT", 1),  # Ctrl-C
    ("SIGTERM", 3),  # of a launcher, which sends it more than once
    ("SIGHUP", 1),  # of a terminal that was closed
    ("SIGUSR1", 1),  # of Slurm, before the time is up
])
def test_a_signal_stops_a_run_after_its_step_with_a_checkpoint(
        pair, whole, out, monkeypatch, handlers, name, times):
    def send():
        for _ in range(times):
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch:
        in_step(2, send, patch)
        assert status_of(pair, out) == 130
    assert names_in(out) == ["checkpoint-000002"]
    train(pair, out, resume=True)
    assert_same_run(whole, out)


def test_a_hangup_that_nohup_ignores_stays_ignored(pair, out, monkeypatch, handlers):
    def hang_up():
        signal.raise_signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    in_step(1, hang_up, monkeypatch)
    train(pair, out)
    assert steps_in(out) == [1, 2, 3]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_first_ctrl_c_says_what_happens_and_the_second_stops_at_once(
        pair, out, monkeypatch, capfd, handlers):
    said = []

    def press_twice():
        signal.raise_signal(signal.SIGINT)
        said.append(capfd.readouterr().err)
        signal.raise_signal(signal.SIGINT)

    in_step(2, press_twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(pair, out)
    assert said == ["\nstopping after this step; Ctrl-C again stops at once\n"]
    assert steps_in(out) == [1]
    assert names_in(out) == []


def test_no_evaluation_begins_after_a_stop_was_asked_for(pair, busy_whole, out, monkeypatch):
    """It may take longer than the 30 seconds that a launcher grants. A resumed run makes it up."""
    with monkeypatch.context() as patch:
        in_step(2, f.STOP.set, patch)
        assert status_of(pair, out, busy(pair)) == 130
    assert steps_in(out) == [1, 2]
    assert evaluations_in(out) == [0]
    train(pair, out, busy(pair), resume=True)
    assert_same_run(busy_whole, out)


def test_a_stop_during_loading_evaluates_and_saves_nothing(pair, busy_whole, out, monkeypatch):
    load = f.load

    def load_and_stop(config):
        f.STOP.set()
        return load(config)

    with monkeypatch.context() as patch:
        patch.setattr(f, "load", load_and_stop)
        assert status_of(pair, out, busy(pair)) == 130
    assert log_of(out) == []
    assert names_in(out) == []
    train(pair, out, busy(pair), resume=True)
    assert_same_run(busy_whole, out)


def wait_until(condition):
    """Look again and again."""
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.002)


def wait_for_steps(folder, count):
    """Wait until a run has logged so many steps."""

    def are_done():
        return (folder / "metrics.jsonl").exists() and len(steps_in(folder)) >= count

    wait_until(are_done)


@slow
def test_a_signal_and_a_kill_lose_nothing(pair, tmp_path, out, start):
    """A process that is told to stop, is resumed and killed and resumed once more, ends where one
    ends that was left alone."""
    settings = {"steps": 60, "save_every": 3, "batch_size": 4, "max_new_tokens": 6}
    train(pair, tmp_path / "whole", settings)
    log = tmp_path / "log"
    run = start(flags(pair, out, **settings), log)
    wait_for_steps(out, 4)
    for _ in range(3):  # launchers send it more than once
        run[0].terminate()
        time.sleep(0.02)
    codes, text = end(run, log)
    assert codes == {130}, text
    assert "stopping after this step" in text
    assert "go on " in text
    assert "error" not in text
    stopped_at = names_in(out)[-1]

    def has_saved():
        return names_in(out)[-1] > stopped_at

    run = start(flags(pair, out, resume=True, **settings), log)
    wait_until(has_saved)
    run[0].kill()
    codes, text = end(run, log)
    assert codes == {-signal.SIGKILL}, text
    train(pair, out, settings, resume=True)
    assert_same_run(tmp_path / "whole", out)


def state_of_process():
    """What a run changes in its process."""
    return {
        "handlers": [signal.getsignal(getattr(signal, name)) for name in STOPPING],
        "threads": torch.get_num_threads(),
        "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }


@pytest.mark.parametrize("ending", [None, f.UserError("a mistake"), KeyboardInterrupt()])
def test_main_leaves_its_process_as_it_found_it(
        pair, out, monkeypatch, handlers, ending):
    """It may be a notebook's."""
    within = {}
    train_as_ever = f.train

    def watched(config):
        finished = train_as_ever(config)
        torch.set_num_threads(1)  # as for a tiny pair
        within.update(state_of_process())
        if ending is not None:
            raise ending
        return finished

    monkeypatch.setattr(f, "train", watched)
    torch.set_num_threads(2)
    before = state_of_process()
    try:
        train(pair, out)
    except (SystemExit, KeyboardInterrupt) as error:
        assert ending is not None, error
    after = state_of_process()
    torch.set_num_threads(1)
    assert after == before
    for name in before:
        assert within[name] != before[name], name


class Notebook:
    """Standard output as a notebook has it: not a file, and nothing to reconfigure."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_run_is_at_home_in_a_thread_of_a_notebook(pair, out, monkeypatch):
    """Where it has no say in signals."""
    notebook = Notebook()
    endings = []

    def work():
        train(pair, out)
        endings.append("well")

    monkeypatch.setattr(sys, "stdout", notebook)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert endings == ["well"]
    assert "3 of 3 steps" in notebook.text


def test_a_run_needs_no_standard_output(pair, out, monkeypatch):
    """A program with windows has none."""
    monkeypatch.setattr(sys, "stdout", None)
    train(pair, out)
    assert names_in(out) == ["checkpoint-000003"]


def test_a_screen_that_has_gone_does_not_end_a_run(pair, out, monkeypatch):
    """A terminal that was closed, or `python fire_opd.py ... | head`."""

    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    train(pair, out)
    assert names_in(out) == ["checkpoint-000003"]


@pytest.mark.parametrize("ending,status", [
    (None, 0),
    (SystemExit(2), 2),
    (SystemExit(130), 130),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError("a fault of ours"), 1),
])
def test_the_process_ends_as_main_does(monkeypatch, capsys, handlers, ending, status):
    seen = []

    def main(argv):
        seen.extend(argv)
        if ending is not None:
            raise ending

    monkeypatch.setattr(f, "main", main)
    monkeypatch.setattr(sys, "argv", ["fire_opd.py", "--steps", "5"])
    with pytest.raises(SystemExit) as stop:
        f.run_as_script()
    assert stop.value.code == status
    assert seen == ["--steps", "5"]
    assert ("ZeroDivisionError: a fault of ours" in capsys.readouterr().err) is (status == 1)
    signal.raise_signal(signal.SIGTERM)  # is ignored from now on: the status is settled


def test_a_rank_ends_at_once(tmp_path, monkeypatch, handlers):
    """Python's own way out may wait for what waits for other ranks."""
    ended = []

    def stop(argv):
        raise SystemExit(130)

    monkeypatch.setattr(f, "main", stop)
    monkeypatch.setattr(f, "WORLD_SIZE", 2)
    monkeypatch.setattr(os, "_exit", ended.append)
    with open(tmp_path / "screen", "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        with warnings.catch_warnings(), pytest.raises(SystemExit):
            f.run_as_script()
    assert ended == [130]


def test_main_never_looks_at_the_command_line_of_its_process(monkeypatch):
    """In a notebook, or here, that is another program's."""
    seen = []

    def parse_config(argv):
        seen.append(list(argv))
        raise f.UserError("that is enough")

    monkeypatch.setattr(f, "parse_config", parse_config)
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    with pytest.raises(SystemExit):
        f.main()
    assert seen == [[]]


# --- Ranks ---------------------------------------------------------------------------------------


def train_on(ranks, argv, log, start):
    """A run on some ranks that comes to its end. -> what they have written"""
    processes = start(argv, log, ranks)
    codes, text = end(processes, log)
    assert codes == {0}, text
    return text


@slow
@pytest.mark.parametrize("ranks,settings", [
    (2, {"batch_size": 12, "max_new_tokens": 12}),
    # One trajectory is kept: two ranks have nothing to train on.
    (3, {"batch_size": 6, "filter_percentile": 90}),
    # Thirds are not exact: the order of sums shows in the bits.
    (3, {"batch_size": 12, "micro_batch_tokens": 30}),
    # Responses longer than a segment; in the evaluation one rank has more batches than the other.
    (2, {"batch_size": 8, "shard": True, "gradient_checkpointing": True,
         "micro_batch_tokens": 40, "max_new_tokens": 70, "rollout_batch_size": 4}),
])
def test_two_and_three_ranks_are_the_same_run(pair, tmp_path, start, ranks, settings):
    routed = pair / "routed.jsonl"
    held_out = routed.read_text().splitlines(keepends=True)[:9]  # nine: 5 and 4 on two ranks
    (tmp_path / "eval.jsonl").write_text("".join(held_out))
    settings = settings | {
        "teacher": [f"one={pair / 'teacher'}", f"two={pair / 'other'}"], "prompts": routed,
        "eval_prompts": tmp_path / "eval.jsonl", "save_every": 2,
        # Of a first gradient that is all rounding (2e-8, with an epsilon of 1e-8) AdamW makes a
        # step of up to lr.
        "lr": 1e-3}
    one, many, cut = tmp_path / "one", tmp_path / "many", tmp_path / "cut"
    train(pair, one, settings)
    text = train_on(ranks, flags(pair, many, **settings), tmp_path / "log", start)
    assert text.count("step 3: evaluation") == 1  # rank 0 alone prints
    assert_same_metrics(log_of(one), log_of(many), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(weights_of(one), weights_of(many), rtol=1e-3, atol=1e-4)
    ours, theirs = moments_of(one), moments_of(many)
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        torch.testing.assert_close(
            state["exp_avg"], theirs[name]["exp_avg"], rtol=1e-3, atol=1e-6)
    for name in ("config.json", "generation_config.json"):  # also of a sharded student
        expected = (f.checkpoints(one)[-1] / name).read_bytes()
        assert (f.checkpoints(many)[-1] / name).read_bytes() == expected
    # Resumed on as many ranks it is the same run to the bit ...
    shutil.copytree(many, cut)
    shutil.rmtree(cut / "checkpoint-000003")
    train_on(ranks, flags(pair, cut, resume=True, **settings), tmp_path / "log2", start)
    assert_same_run(many, cut)
    # ... and one rank goes on with what many have saved.
    train(pair, one, settings, resume=True, steps=4)
    train(pair, many, settings, resume=True, steps=4)
    assert_same_metrics(log_of(one), log_of(many), rel=1e-3, abs=1e-4)
    assert names_in(many)[-1] == "checkpoint-000004"


@slow
def test_a_sharded_student_in_bf16_is_near_the_run_in_float32(pair, tmp_path, start):
    """Its weights are cast for the products, not its uniforms: in bf16 some of them would be 1,
    which is beyond the last token."""
    settings = {"steps": 1, "batch_size": 600, "max_new_tokens": 1}
    uniforms = f.stateless_uniforms((0, f.SAMPLE, 0), range(600), 1)
    assert (uniforms.bfloat16() == 1).any()
    train(pair, tmp_path / "exact", settings)
    settings |= {"shard": True, "dtype": "bfloat16"}
    train_on(2, flags(pair, tmp_path / "rounded", **settings), tmp_path / "log", start)
    exact, rounded = log_of(tmp_path / "exact")[0], log_of(tmp_path / "rounded")[0]
    assert rounded["skipped_updates"] == 0
    assert rounded["student_entropy"] == pytest.approx(exact["student_entropy"], rel=0.05)
    assert rounded["student_entropy"] != exact["student_entropy"]


@slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(pair, tmp_path, out, start):
    ranks = start(flags(pair, out, steps=9999), tmp_path / "log", 2)
    wait_for_steps(out, 2)
    ranks[1].terminate()
    codes, text = end(ranks, tmp_path / "log")
    assert codes == {130}, text
    assert names_in(out) == [f"checkpoint-{steps_in(out)[-1]:06d}"]


@slow
def test_a_mistake_is_a_line_from_each_rank(pair, tmp_path, out, start):
    argv = flags(pair, out, batch_size=5)
    codes, text = end(start(argv, tmp_path / "log", 2), tmp_path / "log")
    assert codes == {2}
    lines = text.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: batch_size must be a multiple of rollouts_per_prompt")


def torchrun(argv, env=CPU):
    """The command on two ranks, by torch's own launcher."""
    port = str(29400 + os.getpid() % 5000)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--master-port", port, str(FILE), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)


@slow
def test_an_error_on_one_rank_ends_all_of_torchrun_quickly(pair, whole, out):
    """Here rank 0 finds the folder taken. The other waits for it, but not the half day that Gloo
    would let it."""
    shutil.copytree(whole, out)
    done = torchrun(flags(pair, out))
    assert done.returncode == 1
    assert done.stderr.count("error: output folder") == 1
    assert "it holds a run; continue it with --resume" in done.stderr
    assert "Root Cause" in done.stderr  # torchrun's own report comes after it


@slow
@pytest.mark.parametrize("shard", [False, True])
def test_compiled_ranks_have_the_losses_of_eager_ones(pair, whole, tmp_path, out, start, shard):
    settings = {"compile": True}
    if shard:
        settings["shard"] = True
    train_on(2, flags(pair, out, **settings), tmp_path / "log", start)
    assert_same_metrics(log_of(whole), log_of(out), rel=1e-3, abs=1e-4)


# --- The README ----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def blocks_of(language):
    """The code blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_printed_as_ci_runs_them():
    commands = "\n".join(blocks_of("bash")).splitlines()
    assert "pip install -r requirements.txt && python fire_opd.py" in commands
    assert "python -m pytest -q" in commands


def test_every_flag_in_the_readme_is_a_setting():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README))
    others = {"help", "nproc-per-node", "shutdown-timeout"}  # the last two are torchrun's
    assert len(flags) > 20
    for flag in flags - others:
        assert flag.replace("-", "_") in vars(f.Config()), flag


def test_every_function_in_the_table_of_a_step_exists():
    table = README.split("## One step")[1].split("## Read the file")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) > 8
    for name in names:
        assert callable(getattr(f, name)), name


def test_every_metric_is_in_the_glossary(pair, tmp_path):
    teachers = [f"one={pair / 'teacher'}", f"two={pair / 'other'}"]
    f.main(flags(pair, tmp_path / "out", teacher=teachers, prompts=pair / "routed.jsonl",
                 eval_prompts=pair / "routed.jsonl"))
    glossary = re.findall(r"`([a-z_]+)", README.split("**Metrics.**")[1].split("**")[0])
    logged = set()
    for row in log_of(tmp_path / "out"):
        logged |= row.keys()
    assert len(logged) > 30
    for name in logged:
        plain = name.removeprefix("eval/").split("/")[0]
        plain = plain.removesuffix("_kept").removesuffix("_dropped")
        assert plain in glossary, name


@pytest.mark.parametrize("block", blocks_of("python"))
def test_every_python_block_compiles(block):
    compile(block, "README.md", "exec")


def test_the_exercises_test_themselves(monkeypatch):
    monkeypatch.setattr(f, "main", lambda *args: None)
    tried = 0
    for block in blocks_of("python"):
        if "import torch, fire_opd" in block:
            for name in ("token_weights", "trajectory_scores", "token_advantages"):
                monkeypatch.setattr(f, name, getattr(f, name))  # put back afterwards
            exec(block, {})
            tried += 1
    assert tried == 3


@slow
def test_the_runnable_commands_run_in_an_empty_folder(tmp_path, start):
    """The dry run on the tiny pair: a run, another arm of it, two ranks, a resume, an evaluation.
    The pair is laid ready, hardly trained, since making it three times would take a minute."""
    tiny = json.loads((HERE / "tiny_config.json").read_text())["tiny"]
    for name in ("tiny", "opd", "two"):
        folder = tmp_path / "runs" / name / "tiny-foreign-0"
        folder.mkdir(parents=True)
        f.write_tiny(folder, tiny | tiny["tasks"]["foreign"] | {"pretrain_steps": 1}, 0)
    [block] = re.findall(r"<!-- runnable -->\s*```bash\n(.*?)```", README, re.DOTALL)
    said = []
    for command in block.splitlines():
        words = command.replace("runs/", f"{tmp_path}/runs/").split()
        ranks = 1
        if "torchrun" in words:
            ranks = int(words[words.index("--nproc-per-node") + 1])
        argv = words[words.index("fire_opd.py") + 1:]
        log = tmp_path / f"log{len(said)}"
        codes, text = end(start(argv, log, ranks), log)
        assert codes == {0}, text
        said.append(text)
    assert len(said) == 5
    for text in said[:3]:
        assert "3 of 3 steps, metrics in" in text
    assert f"5 of 5 steps, metrics in {tmp_path}/runs/tiny/metrics.jsonl" in said[3]
    assert said[4].rstrip().splitlines()[-1].startswith("step 0: evaluation:")


# --- A GPU: these skip themselves where there is none; all others run on the CPU -----------------


needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def gpu(monkeypatch):
    """In these tests runs are on the GPU."""
    monkeypatch.setattr(f, "DEVICE", "cuda")


@needs_gpu
@pytest.mark.parametrize("dtype,alike,tolerance", [
    ("float32", 0.9, 1e-3),
    ("bfloat16", 0.5, 0.1),
])
def test_on_a_gpu_a_step_is_the_cpus_up_to_rounding(
        gpu, pair, tmp_path, monkeypatch, dtype, alike, tolerance):
    settings = {"batch_size": 32, "max_grad_norm": 1e9}
    with monkeypatch.context() as patch:
        patch.setattr(f, "DEVICE", "cpu")
        run = loaded(pair, tmp_path / "cpu", **settings)
        expected = graded_step(run)
        gradients, _ = gradient(run, expected)
    run = loaded(pair, tmp_path / "gpu", dtype=dtype, **settings)
    # A rounding may flip a token, and with it all that follow.
    ours = responses_of(graded_step(run).rollouts)
    theirs = responses_of(expected.rollouts)
    same = [a == b for a, b in zip(ours, theirs)]
    assert sum(same) >= alike * 32
    # The same rollouts have the same scores ...
    log_probs, _ = f.score(run, expected.rollouts)
    scores = f.trajectory_scores(log_probs, expected.rollouts.mask)
    torch.testing.assert_close(scores, expected.scores, rtol=tolerance, atol=tolerance)
    # ... and the same gradient.
    on_gpu, _ = gradient(run, expected)
    for name, there in gradients.items():
        distance = (on_gpu[name].cpu() - there).norm()
        assert distance <= tolerance * there.norm() + 1e-5, name


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_a_captured_graph_draws_the_tokens_of_eager_decoding(
        gpu, pair, out, monkeypatch, dtype):
    graphs = []
    make_graph = torch.cuda.CUDAGraph

    def counted():
        graphs.append(make_graph())
        return graphs[-1]

    run = loaded(pair, out, dtype=dtype, max_new_tokens=40)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", counted)
    monkeypatch.setattr(f.Policy, "segment", 8)  # after which rows leave, and one more is captured
    prompts = [prompt.ids for prompt in run.prompts[:12]]
    uniforms = f.stateless_uniforms((0, f.SAMPLE, 0), range(12), 40)
    captured = run.student.sample(prompts, uniforms)
    assert len(graphs) > 1
    count = len(graphs)
    run.student.use_cuda_graph = False
    eager = run.student.sample(prompts, uniforms)
    assert len(graphs) == count
    response = f.mask_responses(eager[0], run.student.eos_ids)
    assert len(response.sum(1).unique()) > 3  # rows of many lengths
    assert torch.equal(captured[0][response], eager[0][response])
    for ours, theirs in zip(captured[1:], eager[1:]):  # log pi and H
        torch.testing.assert_close(ours[response], theirs[response], rtol=1e-4, atol=1e-5)


@needs_gpu
def test_on_a_gpu_a_run_saves_and_resumes(gpu, pair, out):
    settings = {"dtype": "auto", "save_every": 1}
    train(pair, out, settings)
    train(pair, out, settings, steps=5, resume=True)
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["skipped_updates"] == 0
        assert row["peak_memory_gb"] > 0


@needs_gpu
@slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_ranks_agree_over_nccl(gpu, pair, tmp_path):
    train(pair, tmp_path / "one", batch_size=12)
    done = torchrun(flags(pair, tmp_path / "two", batch_size=12), os.environ)
    assert done.returncode == 0, done.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert_same_metrics(one[:1], two[:1], rel=1e-2, abs=1e-2)
