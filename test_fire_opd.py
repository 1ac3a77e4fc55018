"""The tests as a second tutorial, in the order of fire_opd.py, each named as a sentence.

The first part shows the method: formulas against examples worked by hand, naive float64 loops,
enumeration and finite differences. Offline, on a CPU; the tests of a GPU come last and skip
themselves where there is none.

    python -m pytest -q                   # all of them
    python -m pytest -q -m "not slow"     # the tutorial, in some seconds
"""

import copy
import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import fire_opd as f

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # as the program does for its own process
transformers.logging.disable_progress_bar()
FILE = Path(f.__file__).resolve()
CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
GPU = f.DEVICE == "cuda"
f.DEVICE = "cpu"  # until the last section, which turns to the GPU
slow = pytest.mark.slow  # starts processes, or compiles

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
        values = value if isinstance(value, list) else [value]
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    return argv

def loaded(pair, out, **changes):
    """A Run that is ready to step, in this process."""
    config = f.parse_config(flags(pair, out, **changes))
    f.start_ranks()
    return f.load_run(config)

def train(pair, folder, settings={}, **changes):
    """A run that comes to its end."""
    f.main(flags(pair, folder, **settings | changes))

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
    state = torch.load(f.checkpoints(folder)[-1] / "training.pt", weights_only=True)
    return state["optimizer"]["state"]

def assert_same_run(a, b):
    """Two runs agree to the bit: in their logs, their weights and their moments."""
    assert_same_metrics(log_of(a), log_of(b), rel=0, abs=0)
    for theirs, ours in ((weights_of(a), weights_of(b)), (moments_of(a), moments_of(b))):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

def graded_step(run):
    """A step of train_step up to its update, which is left out. -> Rollouts"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f, "update", lambda *args: {})
        graded, metrics = f.train_step(run)
    run.step -= 1  # so that it can be taken again
    return graded

def gradient(run, graded):
    """The gradient of a step as the optimizer gets it, which only notes it; and the metrics."""
    gradients = {}

    def note():
        for name, parameter in run.student.named_parameters():
            gradients[name] = parameter.grad.clone()

    run.optimizer.step = note
    metrics = f.update(run, graded)
    return gradients, metrics

def responses_of(rollouts):
    """The response tokens of each row."""
    return [ids[mask].tolist() for ids, mask in zip(rollouts.tokens, rollouts.mask)]

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

@pytest.mark.parametrize("percentile", [7, 14, 28, 55, 56, 57, 58])
def test_a_score_that_is_the_quantile_is_kept(percentile):
    """Of 101 scores: the place 0.55 * 100 is 55.00000000000001 in floats."""
    scores = torch.linspace(-3, 0, 101, dtype=torch.float64)
    assert f.filter_trajectories(scores, percentile).sum() == 101 - percentile

@pytest.mark.parametrize("percentile", [-1, 100.1, math.nan])
def test_a_percentile_out_of_bounds_is_an_error(percentile):
    with pytest.raises(RuntimeError, match="quantile"):
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

RISING = torch.linspace(0, 2, 7)[None]

FLAT = torch.ones(1, 7)

ALL_SEVEN = torch.ones(1, 7)

def test_weights_fall_with_the_hesitation_of_the_teacher():
    weights = f.token_weights(RISING, FLAT, ALL_SEVEN)
    assert (weights.diff() < 0).all()

def test_weights_rise_with_the_hesitation_of_the_student():
    weights = f.token_weights(FLAT, RISING, ALL_SEVEN)
    assert (weights.diff() > 0).all()

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

# Two tokens: the teacher likes the first better than the student did and the second less.
STUDENT = torch.tensor([[-2.0, -1.0]])
TEACHER = torch.tensor([[-1.0, -3.0]])  # A = 1, -2
WEIGHTS = torch.tensor([[1.5, 0.5]])  # w A = 3/2, -1
BOTH = torch.ones(1, 2)

def test_the_loss_of_two_tokens_worked_by_hand():
    log_probs = STUDENT.clone().requires_grad_(True)
    loss = f.policy_loss(log_probs, TEACHER, WEIGHTS, BOTH, divisor=2)
    loss.backward()
    assert loss.item() == -(1.5 - 1) / 2  # the weighted estimate of the reverse KL
    assert log_probs.grad.tolist() == [[-1.5 / 2, 1 / 2]]  # minus the weighted advantages

def random_losses(seed):
    """What a policy_loss needs: log_probs, teacher's, weights and mask."""
    mask, weights, noise = random_responses(seed)
    log_probs = -3 * random_uniforms(5, 9, seed + 300)
    teacher = -3 * random_uniforms(5, 9, seed + 400)
    return log_probs.requires_grad_(True), teacher, weights, mask

@pytest.mark.parametrize("seed", range(8))
def test_the_gradient_of_the_loss_is_that_of_weighted_likelihood(seed):
    """REINFORCE: the gradient of -sum w A log pi / divisor, with w and A held fixed, which finite
    differences take of the right-hand side."""
    log_probs, teacher, weights, mask = random_losses(seed)
    loss = f.policy_loss(log_probs, teacher, weights, mask, 17)
    loss.backward()
    here = log_probs.detach()
    praise = weights * (teacher - here)
    slopes = torch.zeros_like(here)
    expected = 0
    for b, t in mask.nonzero():
        expected -= praise[b, t].item() / 17
        rise = praise[b, t] * (here[b, t] + 1e-6) - praise[b, t] * (here[b, t] - 1e-6)
        slopes[b, t] = -rise / 2e-6 / 17
    assert loss.item() == pytest.approx(expected)
    assert_close(log_probs.grad, slopes, rtol=1e-6, atol=1e-7)

# What the released loss function (dp_actor.py at commit 1dfcf6a) returned for single rows:
# alpha, beta, log pi_S, log pi_T, H_S, H_T, then its loss and its gradient.
RELEASED = [
    (1, 1, [-1.971, -0.698, -1.275, -0.621], [-1.437, -2.882, -0.292, -3.88],
     [1.257, 1.531, 0.226, 1.712], [0.391, 1.481, 0.506, 0.466],
     1.149354, [-0.158346, 0.407482, -0.181756, 1.081974]),
    (1, 1, [-1.889], [-0.431], [1.344], [1.863], -1.458, [-1.458]),
    (1, 1, [-1.653, -0.861], [-2.779, -2.084], [1.918, 0.777], [0.871, 1.474],
     1.158272, [0.751374, 0.406898]),
    (2, 0.5, [-0.89, -1.541, -1.933, -2.697], [-3.571, -3.219, -1.019, -1.873],
     [0.952, 1.277, 0.896, 0.159], [0.82, 1.694, 1.577, 1.23],
     0.96843, [1.000957, 0.336909, -0.188091, -0.181345]),
    (2, 0.5, [-2.042, -0.6], [-2.365, -3.157], [1.906, 0.892], [1.544, 0.323],
     1.841845, [0.1034, 1.738445]),
]

@pytest.mark.parametrize("alpha,beta,log_probs,teacher,student_h,teacher_h,loss,gradient", RELEASED)
def test_loss_and_gradient_of_a_row_are_those_of_the_released_code(
        alpha, beta, log_probs, teacher, student_h, teacher_h, loss, gradient):
    log_probs = torch.tensor([log_probs], requires_grad=True)
    mask = torch.ones_like(log_probs)
    weights = f.token_weights(
        torch.tensor([teacher_h]), torch.tensor([student_h]), mask, alpha, beta)
    ours = f.policy_loss(log_probs, torch.tensor([teacher]), weights, mask, mask.sum())
    ours.backward()
    assert_close(ours.item(), loss, rtol=0, atol=4e-6)
    assert_close(log_probs.grad, torch.tensor([gradient]), rtol=0, atol=4e-6)

def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step():
    tables = random_losses(0)
    whole = f.policy_loss(*tables, divisor=17)
    parts = 0
    for rows in ([0, 3], [1], [2, 4]):
        of_rows = [table[rows] for table in tables]
        parts += f.policy_loss(*of_rows, divisor=17)
    assert_close(parts, whole)

def test_infinities_off_the_mask_leave_loss_and_gradient_finite():
    log_probs = torch.tensor([[-1.0, math.inf, math.nan]], requires_grad=True)
    teacher = torch.tensor([[-2.0, math.nan, math.inf]])
    weights = torch.tensor([[1.0, math.inf, math.nan]])
    mask = torch.tensor([[1, 0, 0]])
    loss = f.policy_loss(log_probs, teacher, weights, mask, divisor=1)
    loss.backward()
    assert loss.item() == 1
    assert log_probs.grad.tolist() == [[1, 0, 0]]

DIVERGENCES = {  # f of E_S[f(u)], u = pi_T / pi_S
    "reverse KL": lambda u: u - 1 - u.log(),
    "forward KL": lambda u: u * u.log() - u + 1,
    "Jensen-Shannon": lambda u: u * (2 * u / (1 + u)).log() + (2 / (1 + u)).log(),
}

@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_expected_gradient_of_the_loss_is_that_of_the_divergence(monkeypatch, name):
    """All 16 responses of two tokens from a vocabulary of four, each weighed by its probability."""
    generator = DIVERGENCES[name]

    def advantages(teacher_log_probs, student_log_probs):
        """u f'(u) - f(u)"""
        u = (teacher_log_probs - student_log_probs).exp().detach().requires_grad_()
        slope, = torch.autograd.grad(generator(u).sum(), u)
        return u * slope - generator(u)

    if name != "reverse KL":
        monkeypatch.setattr(f, "token_advantages", advantages)
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
        estimate += probability * f.policy_loss(s, t, BOTH, BOTH, divisor=1)
    # The divergence of each context; how probable the contexts themselves are is held fixed.
    divergence = (log_s.exp() * generator((log_t - log_s).exp())).sum(1)
    first_probs = log_s[0].exp().detach()
    exact = divergence[0] + first_probs @ divergence[1:]
    if name == "reverse KL":
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

def test_a_large_vocabulary_is_sampled_as_in_float64():
    torch.manual_seed(0)
    logits = torch.randn(64, 151936)
    uniforms = random_uniforms(64, 1)[:, 0]
    tokens, _, _ = f.sample_tokens(logits, uniforms)
    cdf = logits.softmax(1).double().numpy().cumsum(1)
    for row, u, token in zip(cdf, uniforms.tolist(), tokens.tolist()):
        assert token == np.searchsorted(row, u * row[-1], side="right")

def test_sampling_from_nan_gives_nan_and_does_not_crash():
    logits = torch.full((1, 4), math.nan)
    tokens, log_probs, _ = f.sample_tokens(logits, torch.tensor([0.5]))
    assert 0 <= tokens.item() < 4  # on a GPU a token that does not exist would end the process
    assert log_probs.isnan().all()  # and this tells

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
    for name in ("tokens", "student_log_probs", "student_entropy"):
        ours, theirs = getattr(whole, name), getattr(parts, name)
        assert_nearly_equal(ours[whole.mask], theirs[whole.mask])

def test_log_probs_and_entropies_of_rollouts_are_those_of_whole_logits(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", max_new_tokens=20, temperature=0.7)
    rollouts = f.rollout(run, run.prompts[:12], KEY)
    model = copy.deepcopy(run.student.model).double()
    for i, response in enumerate(responses_of(rollouts)):
        prompt = rollouts.prompts[i].ids
        with torch.no_grad():
            table = table_of(model, prompt, response, 0.7).float()
        own = rollouts.mask[i]
        assert_nearly_equal(rollouts.student_log_probs[i, own], picked(table, response))
        assert_nearly_equal(rollouts.student_entropy[i, own], entropy_of(table))

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

@pytest.mark.parametrize("segment,dtype,tolerance", [
    (1, "float32", 1e-5), (4, "float32", 1e-5), (64, "float32", 1e-5),
    (4, "bfloat16", 0.05),  # under autocast keys and values come in different types
])
def test_a_cache_with_free_slots_draws_the_same_tokens_as_transformers_own(
        pair, tmp_path, monkeypatch, segment, dtype, tolerance):
    run = loaded(pair, tmp_path / "out", dtype=dtype)
    run.student.segment = segment
    uniforms = random_uniforms(6, 30)
    ours, our_log_probs, _ = run.student.sample(ids_of(run, 6), uniforms)
    monkeypatch.setattr(f, "DynamicLayer", None)  # so that no layer is one
    theirs, their_log_probs, _ = run.student.sample(ids_of(run, 6), uniforms)
    valid = f.mask_responses(ours, run.student.eos_ids)
    assert valid.sum() > 20
    assert torch.equal(ours[valid], theirs[valid])
    assert torch.allclose(our_log_probs[valid], their_log_probs[valid], atol=tolerance)

def sliding_window():
    """A Qwen3 of which one layer sees only four tokens."""
    kinds = ["full_attention", "sliding_attention"]
    return Qwen3ForCausalLM(Qwen3Config(
        **SMALL, head_dim=16, use_sliding_window=True, sliding_window=4, layer_types=kinds))

def absolute_positions():
    """A GPT-2."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3))

@pytest.mark.parametrize("make", [sliding_window, absolute_positions])
def test_models_of_other_kinds_are_sampled_exactly(make):
    torch.manual_seed(0)
    model = make().eval()
    policy = f.Policy(model, {14}, set(range(16)), f.Config())
    policy.segment = 2
    prompts = [[1, 2, 3, 4, 5], [6, 7]]  # the second one is padded
    tokens, log_probs, _ = policy.sample(prompts, random_uniforms(2, 6))
    valid = f.mask_responses(tokens, {14})
    for i, prompt in enumerate(prompts):
        response = tokens[i, valid[i]].tolist()
        with torch.no_grad():
            table = table_of(model, prompt, response)
        assert_nearly_equal(log_probs[i, valid[i]], picked(table, response))

def test_teachers_are_in_the_type_that_computes_and_the_student_in_float32(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", dtype="bfloat16")
    teacher = run.teachers["teacher"]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
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
    tokens = torch.arange(20)[:, None]
    with torch.no_grad():
        log_probs, entropy = gappy([[1, 2]] * 20, tokens, tokens >= 0)
    log_p = log_probs[:, 0]
    assert (log_p[NO_TOKENS] == -math.inf).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    finite = log_p[log_p.isfinite()]
    assert len(finite) == 14
    assert_nearly_equal(entropy[:, 0], entropy_of(finite[None]).expand(20))

# --- One step ------------------------------------------------------------------------------------

def test_uniforms_are_a_function_of_their_row_alone():
    table = f.stateless_uniforms(KEY, range(6), 4)
    assert table.dtype == torch.float64
    assert table.shape == (6, 4)
    assert len(table.unique()) == 24
    assert table.min() >= 0
    assert table.max() < 1
    elsewhere = f.stateless_uniforms(KEY, [4, 1], 4)  # another rank, another batch
    assert torch.equal(elsewhere, table[[4, 1]])

def test_every_prompt_is_met_once_an_epoch(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=16)
    met = []
    for run.step in range(5):  # 5 steps of 16 are two epochs of 40; the third step is in both
        met += [id(prompt) for prompt in f.step_prompts(run)]
    everyone = {id(prompt) for prompt in run.prompts}
    assert set(met[:40]) == everyone
    assert set(met[40:]) == everyone
    assert met[:40] != met[40:]

def test_each_row_is_scored_by_its_own_teacher(pair, tmp_path):
    teachers = [f"one={pair / 'teacher'}", f"two={pair / 'other'}"]
    run = loaded(pair, tmp_path / "out", prompts=pair / "routed.jsonl", teacher=teachers)
    models = {
        "one": Qwen3ForCausalLM.from_pretrained(pair / "teacher").double(),
        "two": Qwen3ForCausalLM.from_pretrained(pair / "other").double()}
    rollouts = graded_step(run)
    assert {prompt.teacher for prompt in rollouts.prompts} == {"one", "two"}
    for i, response in enumerate(responses_of(rollouts)):
        prompt = rollouts.prompts[i]
        with torch.no_grad():
            table = table_of(models[prompt.teacher], prompt.ids, response).float()
        own = rollouts.mask[i]
        assert_nearly_equal(rollouts.teacher_log_probs[i, own], picked(table, response))
        assert_nearly_equal(rollouts.teacher_entropy[i, own], entropy_of(table))

def rows_dropped(keep):
    """The numbers of the rows that the filter drops."""
    return (~keep).nonzero()[:, 0].tolist()

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

def noted_step(run):
    """A whole step but for its end: the optimizer notes the gradient and leaves it at that.
    -> Rollouts, metrics, gradients"""
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
    expected, kept = naive_step(run, graded)
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
    metrics = f.update(run, graded)
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
    lengths = graded.total_lengths
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

@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean"])
@pytest.mark.parametrize("ranks", [2, 6])
def test_the_gradients_of_the_ranks_add_up_to_that_of_one(
        pair, tmp_path, monkeypatch, ranks, loss_agg):
    """Without processes: each rank in turn."""
    run = loaded(pair, tmp_path / "out", max_grad_norm=1e9, loss_agg=loss_agg)
    graded = graded_step(run)
    assert graded.keep.sum() < 6  # of six ranks some has none
    whole, whole_metrics = gradient(run, graded)
    monkeypatch.setattr(f, "WORLD_SIZE", ranks)
    monkeypatch.setattr(f, "sum_over_ranks", torch.Tensor.clone)
    total = {name: 0 for name in whole}
    loss = 0
    for rank in range(ranks):
        monkeypatch.setattr(f, "RANK", rank)
        own, metrics = gradient(run, graded)
        loss += metrics["loss"]
        for name in total:
            total[name] += own[name] / ranks  # DDP takes the mean
    assert loss == pytest.approx(whole_metrics["loss"], rel=1e-5)
    assert_same_gradient(total, whole)

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

    def noted(prompts, tokens, mask):
        for row, response in zip(tokens, mask):
            seen.append(row[response].tolist())
        return forward(prompts, tokens, mask)

    monkeypatch.setattr(run.student, "forward", noted)
    graded, _ = f.train_step(run)
    responses = responses_of(graded)
    kept = [responses[i] for i in range(10) if graded.keep[i]]
    assert len(kept) == 4
    assert sorted(seen) == sorted(kept)
    assert not graded.weights[~graded.keep].any()

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

def test_micro_batches_are_filled_from_the_longest_row_on(monkeypatch):
    lengths = [3, 9, 4, 8, 2, 99]
    # Sorted: 9, 8, 4, 3, 2. Two of 9 are over the budget; two of 8 fit; so do two of 3.
    batches = f.micro_batches(range(5), lengths, 16)
    assert batches == [[1], [3, 2], [0, 4]]
    monkeypatch.setattr(f, "WORLD_SIZE", 2)  # the example of its docstring
    assert f.micro_batches(range(5), [9, 5, 4, 2, 1], 10) == [[0], [2, 4]]
    monkeypatch.setattr(f, "RANK", 1)
    assert f.micro_batches(range(5), [9, 5, 4, 2, 1], 10) == [[1], [3]]

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

def test_rows_that_fit_in_one_micro_batch_are_shared_among_the_ranks_all_the_same(monkeypatch):
    monkeypatch.setattr(f, "WORLD_SIZE", 4)
    counts = []
    for rank in range(4):
        monkeypatch.setattr(f, "RANK", rank)
        batches = f.micro_batches(range(10), [3] * 10, 8192)
        counts.append(sum(map(len, batches)))
    assert counts == [3, 3, 2, 2]

def test_a_micro_batch_without_rows_has_a_gradient_of_zeros(pair, tmp_path):
    """A rank that has none takes part in the exchange of gradients all the same."""
    run = loaded(pair, tmp_path / "out")
    rollouts = graded_step(run)
    prompts, tokens, mask = rollouts.select([])
    log_probs, _ = run.student(prompts, tokens, mask)
    nothing = torch.zeros_like(log_probs)
    loss = f.policy_loss(log_probs, nothing, nothing, mask, divisor=5)
    loss.backward()
    for name, parameter in run.student.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name

@slow
def test_compile_changes_no_figure_and_leaves_decoding_alone(pair, tmp_path, monkeypatch):
    """Traced, but run as it is traced: a C++ compiler would take a minute."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    eager = loaded(pair, tmp_path / "eager")
    compiled = loaded(pair, tmp_path / "compiled", compile=True)
    if not traced:
        pytest.skip("nothing is compiled here")
    torch._dynamo.reset()  # what was compiled would have to be compiled again
    count = len(traced)
    f.rollout(compiled, compiled.prompts[:4], KEY)
    assert len(traced) == count  # decoding is eager
    _, expected = f.train_step(eager)
    _, metrics = f.train_step(compiled)
    assert_same_metrics([metrics | {"step": 1}], [expected | {"step": 1}], rel=1e-4, abs=1e-6)
    assert len(traced) > count > 0
    torch._dynamo.reset()

# --- Metrics, evaluation and report --------------------------------------------------------------

@pytest.mark.parametrize("response,answer", [
    ("so \\boxed{\\frac{1}{2}} it is", "\\boxed{\\frac{1}{2}}"),  # a box may hold braces
    ("\\boxed{3} or \\boxed{4}", "4"),  # the last box
    ("\\boxed{3}, see page 9", "3"),  # a box wins over a later number
    ("12 apples, then 7", "7"),
    ("it is -1.50", "-1.50"),
    ("it is 1/2", "1/2"),
    ("The answer is $1,234.", "1234"),
    ("72", "it is 72, or 72.5\n#### 72"),  # as in GSM8K
    ("it is 72.0", "72"),
    ("\\boxed{1.50}", "1.5"),
    ("10-3", "3"),  # a minus and no sign
    ("it is (-3).", "-3"),
    ("so it is 72.", "72"),
    ("blue.", "blue"),
    ("01358", "01358"),
    ("blue", "blue"),
])
def test_an_answer_is_the_last_box_or_the_last_number_or_the_whole_text(response, answer):
    assert f.final_answer(response) == f.final_answer(answer)

@pytest.mark.parametrize("response,answer", [
    ("\\boxed{3} or \\boxed{4}", "3"),
    ("12 apples, then 7", "12"),
    ("it is 1/2", "2"),
    ("10-3", "-3"),
    ("100", "1"),
    ("\\boxed{", "3"),
    ("", "3"),
])
def test_another_answer_is_wrong(response, answer):
    assert f.final_answer(response) != f.final_answer(answer)

class Ending:
    """A student, as far as metrics look at it."""
    eos_ids = {14}

def three_rollouts():
    """A Run, and a step with figures that are easily added up: two rollouts are kept, of which
    one is right, and the third, which is dropped, never ends and has no known answer."""
    prompts = []
    for answer, domain in (("12", "a"), ("3", "b"), (None, "a")):
        prompts.append(f.Prompt([1], answer, "teacher", domain))
    tokens = torch.tensor([[1, 2, 14], [4, 14, 0], [6, 6, 6]])
    mask = f.mask_responses(tokens, {14})
    student_entropy = torch.tensor([[1.0, 2, 3], [5, 5, 0], [4, 4, 4]])
    r = f.Rollouts(prompts, [4, 3, 4], tokens, mask, -torch.ones(3, 3), student_entropy)
    r.teacher_log_probs = torch.tensor([[-1.0, -1, -1], [-2, -2, 0], [-4, -4, -4]])
    r.teacher_entropy = torch.tensor([[1.0, 1, 1], [3, 3, 0], [2, 2, 2]])
    r.weights = torch.tensor([[2, 0.5, 0.5], [1, 1, 0], [0, 0, 0]])
    r.scores = torch.tensor([-1.0, -2, -4])
    r.keep = torch.tensor([True, True, False])
    run = f.Run(f.Config(), f.tiny_tokenizer(), [], [], Ending(), None, None, None)
    return run, r

def test_the_figures_of_a_step_worked_by_hand():
    run, rollouts = three_rollouts()
    run.seconds = {"rollout": 1.0, "grade": 1.0, "update": 2.0}
    figures = f.measure_step(run, rollouts)
    assert figures["reverse_kl"] == pytest.approx((3 * 0 + 2 * 1 + 3 * 3) / 8)  # of eight tokens
    assert figures["score"] == pytest.approx(-(1 + 2 + 4) / 3)
    assert figures["teacher_entropy"] == pytest.approx((3 * 1 + 2 * 3 + 3 * 2) / 8)
    assert figures["student_entropy"] == pytest.approx((1 + 2 + 3 + 5 + 5 + 3 * 4) / 8)
    assert figures["response_length"] == pytest.approx(8 / 3)
    assert figures["truncated_ratio"] == pytest.approx(1 / 3)
    assert figures["exact_match"] == 1 / 2  # of the two answers that are known
    assert figures["reverse_kl_kept"] == pytest.approx(2 / 5)
    assert figures["reverse_kl_dropped"] == 3
    assert math.isnan(figures["exact_match_dropped"])  # nothing is known of it
    assert figures["keep_ratio"] == pytest.approx(2 / 3)
    assert figures["filter_threshold"] == -2  # the lowest score that was kept
    # The effective sample size of the weights 2, 1/2, 1/2, 1, 1, as a share of their number:
    assert figures["weight_ess"] == pytest.approx(5**2 / 6.5 / 5)
    assert figures["seconds_update"] == 2
    assert figures["tokens_per_second"] == 8 / 4

def test_an_evaluation_has_the_figures_of_each_domain_and_draws_the_same_each_time(
        pair, tmp_path):
    run = loaded(pair, tmp_path / "out", eval_prompts=pair / "prompts.jsonl")
    f.evaluate(run)
    run.step = 2
    f.evaluate(run)
    first, second = log_of(tmp_path / "out")
    assert first | {"step": 2} == second
    rollouts = f.rollout(run, run.eval_prompts, (0, f.EVALUATE))
    lengths = [len(tokens) for tokens in responses_of(rollouts)]
    assert first["eval/response_length"] == pytest.approx(np.mean(lengths))
    assert first["eval/response_length/a"] == pytest.approx(np.mean(lengths[::2]))
    assert first["eval/response_length/b"] == pytest.approx(np.mean(lengths[1::2]))

def test_the_report_holds_the_log_and_is_safe_whatever_its_rollouts_say(
        tmp_path, monkeypatch, capsys):
    run, rollouts = three_rollouts()
    run.config.output_dir = str(tmp_path)
    run.step = run.config.steps = 1
    evil = "</script><script>alert(1)</script>"
    monkeypatch.setattr(run.tokenizer, "decode", lambda *args, **kwargs: evil)
    f.report_step(run, rollouts, {"loss": 0.5, "reverse_kl": math.nan, "response_length": 2.0,
                                  "tokens_per_second": 9.0, "skipped_updates": 0})
    screen = capsys.readouterr().out
    assert screen.count(", score -") == 2  # one was kept, one was dropped
    f.log(run, {"reverse_kl": 4.0})
    f.log(run, {"reverse_kl": 1.0, "reverse_kl/<b>": 9.0})
    f.write_report(run, rollouts)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "http" not in page
    assert page.count("&lt;script&gt;") == 3 + 8  # three prompts and eight tokens
    assert 'points="1,5.0 1,8.0"' in page  # the curve of reverse_kl from 4 down to 1, under 9
    assert "reverse_kl/&lt;b&gt; 9" in page and "/<b>" not in page
    lefts = [float(left) for left in re.findall("left: ([0-9.]+)%", page)]
    assert lefts == [99, 0, 66]  # domain a has the scores -1 and -4, domain b has -2
    titles = re.findall('title="([^"]*)"', page)
    assert titles[0] == "w 2.000, log pi_T -1.000, log pi_S -1.000, H_T 1.000, H_S 1.000"
    shades = re.findall("<span title.*?rgba\\((.*?)\\)", page)
    assert shades == ["255,140,0,1.50", "70,130,255,0.75", "70,130,255,0.75", "70,130,255,0.00",
                      "70,130,255,0.00"] + ["70,130,255,0.00"] * 3  # the dropped has none

# --- Settings and prompts ------------------------------------------------------------------------

def test_the_command_line_wins_over_json_and_json_over_defaults(tmp_path):
    path = tmp_path / "settings.json"
    settings = {"lr": 0.5, "seed": 3, "compile": True, "teacher": ["a=x", "b=y"], "student": "s",
                "prompts": "p"}
    path.write_text(json.dumps(settings))
    config = f.parse_config(["--config", str(path), "--seed", "4", "--batch_size", "8"])
    assert (config.lr, config.seed, config.batch_size) == (0.5, 4, 8)
    assert config.compile is True
    assert config.teacher == ["a=x", "b=y"]
    assert config.filter_percentile == 20
    config = f.parse_config(["--config", str(path), "--teacher", "z", "--compile", "false"])
    assert config.teacher == ["z"]
    assert config.compile is False

def test_null_in_json_is_as_if_absent(tmp_path):
    path = tmp_path / "settings.json"
    settings = {"eval_prompts": None, "steps": None, "teacher": "t", "student": "s", "prompts": "p"}
    path.write_text(json.dumps(settings))
    config = f.parse_config(["--config", str(path)])
    assert (config.eval_prompts, config.steps) == ("", 100)

def test_without_models_it_is_the_tiny_pair():
    config = f.parse_config([])
    assert config.tiny
    assert config.steps == 50

def test_help_shows_settings_with_their_defaults(capsys):
    with pytest.raises(SystemExit):
        f.main(["--help"])
    text = capsys.readouterr().out
    assert "--filter-percentile" in text
    assert "drops this share of the rollouts, in % (default: 20.0)" in " ".join(text.split())

def chat_tokenizer():
    """The tiny tokenizer with a chat template."""
    tokenizer = f.tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{{ ',' if message.role == 'user' }}"
        "{% endfor %}{{ '=' if add_generation_prompt }}{{ '+' if enable_thinking }}")
    return tokenizer

def parse(row, tokenizer=None, teachers=("teacher",), **settings):
    """A row of a prompt file -> Prompt"""
    if tokenizer is None:
        tokenizer = f.tiny_tokenizer()
    return f.parse_prompt(row, tokenizer, f.Config(**settings), set(range(16)), list(teachers))

def said(role, content):
    """A message."""
    return {"role": role, "content": content}

@pytest.mark.parametrize("row,text", [
    ({"prompt": "12"}, "12,="),
    ({"question": "12"}, "12,="),
    ({"messages": [said("system", "7"), said("user", "12")]}, "712,="),
    ({"messages": [said("user", "1"), said("assistant", "2")]}, "1,="),  # the reply is dropped
])
def test_a_prompt_goes_through_the_chat_template(row, text):
    prompt = parse(row, chat_tokenizer())
    assert chat_tokenizer().decode(prompt.ids) == text

def test_thinking_is_passed_on_and_without_a_template_a_string_stays_as_it_is():
    tokenizer = chat_tokenizer()
    assert tokenizer.decode(parse({"prompt": "1"}, tokenizer, enable_thinking=True).ids) == "1,=+"
    assert f.tiny_tokenizer().decode(parse({"prompt": "12"}).ids) == "12"

@pytest.mark.parametrize("row,answer,teacher,domain", [
    ({"prompt": "1", "answer": 0}, "0", "teacher", ""),
    ({"prompt": "1", "answer": None, "solution": "2", "domain": "a"}, "2", "teacher", "a"),
    ({"prompt": "1", "ground_truth": "2", "teacher": "teacher"}, "2", "teacher", ""),
    ({"prompt": "1"}, None, "teacher", ""),
    ({"prompt": "1", "answer": None, "teacher": None, "domain": None}, None, "teacher", ""),
])
def test_answer_teacher_and_domain_are_optional(row, answer, teacher, domain):
    prompt = parse(row)
    assert (prompt.answer, prompt.teacher, prompt.domain) == (answer, teacher, domain)

def test_a_prompt_that_its_template_loses_is_refused():
    tokenizer = f.tiny_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(f.UserError, match="it has no tokens"):
        parse({"prompt": "12"}, tokenizer)

def test_a_byte_order_mark_and_blank_lines_are_skipped(pair, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "12+="}\r\n\n{"prompt": "34+="}\n')
    run = loaded(pair, tmp_path / "out", prompts=path)
    assert [prompt.ids[0] for prompt in run.prompts] == [1, 3]

def test_longer_prompts_are_dropped_and_counted(pair, tmp_path, capsys):
    run = loaded(pair, tmp_path / "out", max_prompt_tokens=8)
    assert max(len(prompt.ids) for prompt in run.prompts) == 8
    assert f"{len(run.prompts)} of 40 prompts have at most" in capsys.readouterr().out

# --- Models --------------------------------------------------------------------------------------

@pytest.fixture
def a_copy(pair, tmp_path):
    """A copy of the teacher's folder, to be changed."""
    return Path(shutil.copytree(pair / "teacher", tmp_path / "copy"))

def edit(path, **changes):
    """Change some keys of a JSON file, which may be new."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))

def test_a_teacher_has_a_name_and_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert f.teacher_paths(f.Config(teacher=["lr=1"])) == {"teacher": "lr=1"}
    assert f.teacher_paths(f.Config(teacher=["a=x", "b=y"])) == {"a": "x", "b": "y"}
    for teacher in (["x", "y"], ["a=x", "a=y"], ["student=x"]):
        with pytest.raises(f.UserError):
            f.teacher_paths(f.Config(teacher=teacher))

def test_a_token_that_the_teacher_lacks_is_never_sampled_and_refused_in_prompts(
        pair, tmp_path, capsys, a_copy):
    text = (a_copy / "tokenizer.json").read_text()
    (a_copy / "tokenizer.json").write_text(re.sub(r'"7": 7,', "", text))
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "12+="}])
    run = loaded(pair, tmp_path / "out", teacher=a_copy, prompts=prompts)
    assert (run.student.vocabulary_bias == 0).sum() == 15
    tokens, _, _ = run.student.sample([[1, 2]] * 500, random_uniforms(500, 1))
    assert 7 not in tokens
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "12+="}, {"prompt": "17+="}])
    said = refusal(flags(pair, tmp_path / "other", teacher=a_copy, prompts=prompts), capsys)
    assert "p.jsonl line 2: its tokens ['7'] are not known to all models" in said

def test_a_token_without_an_embedding_is_never_sampled(pair, tmp_path):
    save_model(tmp_path / "short", 5, vocab_size=15)  # of the 16 tokens, one has no row
    run = loaded(pair, tmp_path / "out", teacher=tmp_path / "short")
    assert (run.student.vocabulary_bias == 0).sum() == 15

def test_reserved_tokens_may_differ_and_are_left_out(pair, tmp_path, a_copy):
    text = (a_copy / "tokenizer.json").read_text()
    (a_copy / "tokenizer.json").write_text(text.replace("<unk>", "<reserved>"))
    edit(a_copy / "tokenizer_config.json", unk_token="<reserved>")
    run = loaded(pair, tmp_path / "out", teacher=a_copy)
    assert (run.student.vocabulary_bias == 0).sum() == 15

def test_router_logits_are_not_asked_for(pair, tmp_path, a_copy):
    edit(a_copy / "config.json", output_router_logits=True)
    run = loaded(pair, tmp_path / "out", student=a_copy)
    assert run.student.model.config.output_router_logits is False

@slow
def test_a_model_in_the_hubs_cache_runs_by_its_name(pair, tmp_path):
    """Also offline, and where the cache lacks what nobody needs."""
    cache = tmp_path / "hub" / "models--me--model"
    shutil.copytree(pair / "student", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    argv = flags(pair, tmp_path / "out", student="me/model", teacher="me/model", steps=1)
    run = command(argv, env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    text, _ = run.communicate()
    assert run.returncode == 0, text
    assert (tmp_path / "out" / "checkpoint-000001" / "tokenizer.json").exists()

def test_a_response_ends_with_any_end_of_student_or_teacher(pair, tmp_path, a_copy):
    edit(a_copy / "generation_config.json", eos_token_id=[13, 15, 99])
    run = loaded(pair, tmp_path / "out", teacher=a_copy)
    assert run.student.eos_ids == {13, 14, 15}  # 99 is no token
    assert run.teachers["teacher"].eos_ids == {13, 14, 15}

def test_a_hostile_generation_config_does_not_change_what_is_sampled(pair, tmp_path, a_copy):
    bent = GenerationConfig(do_sample=True, top_k=2, temperature=0.2, suppress_tokens=[1, 2])
    bent.save_pretrained(a_copy)
    run = loaded(pair, tmp_path / "out", student=a_copy, temperature=1.3)
    prompt = run.prompts[0].ids
    tokens, log_probs, _ = run.student.sample([prompt] * 8000, random_uniforms(8000, 1, seed=1))
    with torch.no_grad():
        log_p = table_of(run.student.model, prompt, [0], 1.3)[0]
    assert chi_squared(tokens[:, 0], log_p.exp()) < 37.7  # 15 degrees of freedom, 99.9 %
    assert_nearly_equal(log_probs, log_p[tokens])

# --- Bad input: one line, status 2, no traceback -------------------------------------------------

def refusal(argv, capsys):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        f.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]

@pytest.mark.parametrize("settings,said", [
    ({"lr": "fast"}, "argument --lr"),
    ({"filter_by": "luck"}, "invalid choice: 'luck'"),
    ({"learning_rate": 1}, "unrecognized arguments: --learning-rate"),
    ({"temperature": 0}, "temperature must be greater than 0"),
    ({"lr": "nan"}, "lr must be between 0 and 1e9, got nan"),
    ({"steps": -1}, "steps must be between 0 and 1e9, got -1"),
    ({"filter_percentile": 120}, "filter_percentile must be at most 100"),
    ({"shard": True}, "--shard needs several ranks"),
    ({"student": ""}, "give --teacher, --student and --prompts; or none of them"),
    ({"config": FILE.with_name("tiny_config.json")}, "the tiny pair has its own --teacher"),
    ({"output_dir": "", "resume": True}, "--resume needs the --output-dir"),
    ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: FileNotFoundError"),
    ({"teacher": "nowhere"}, "teacher nowhere: "),
    ({"teacher": ["a=x", "a=y"]}, "--teacher a=y: give each teacher a NAME=PATH of its own"),
    ({"config": "nowhere.json"}, "nowhere.json: FileNotFoundError"),
    ({"max_prompt_tokens": 1}, "fewer prompts than ranks"),
], ids=str)
def test_a_bad_setting_is_refused(pair, tmp_path, capsys, settings, said):
    assert said in refusal(flags(pair, tmp_path / "out", **settings), capsys)

def test_a_second_teacher_flag_does_not_replace_the_first(pair, tmp_path, capsys):
    argv = flags(pair, tmp_path / "out")
    assert "all teachers after one --teacher" in refusal([*argv, "--teacher=b=x"], capsys)

@pytest.mark.parametrize("content,said", [
    ("{", "JSONDecodeError"),
    ('{"stepz": 3}', "unrecognized arguments: --stepz"),
    ('{"steps": "many"}', "argument --steps: invalid int value: 'many'"),
    ('{"filter_by": "luck"}', "invalid choice: 'luck'"),
])
def test_a_bad_settings_file_is_refused(pair, tmp_path, capsys, content, said):
    path = tmp_path / "settings.json"
    path.write_text(content)
    assert said in refusal(flags(pair, tmp_path / "out", config=path), capsys)

@pytest.mark.parametrize("line,said", [
    ("{", "line 2: JSONDecodeError"),
    ('["12+="]', "line 2: each line must be a JSON object"),
    ('{"text": "12+="}', "line 2: give 'prompt'"),
    ('{"prompt": 5}', "line 2: give 'prompt'"),
    ('{"prompt": ["12+="]}', "line 2: each message needs a 'role'"),
    ('{"messages": [{"content": [{"type": "text", "text": "1"}]}]}', "line 2: each message needs"),
    ('{"prompt": "12+=", "teacher": "another"}', "teacher 'another' is not one of ['teacher']"),
    ('{"messages": [{"role": "user", "content": "1"}]}', "line 2: ValueError"),  # no template
])
def test_a_bad_line_of_a_prompt_file_is_named(pair, tmp_path, capsys, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "12+="}\n' + line + "\n")
    assert said in refusal(flags(pair, tmp_path / "out", prompts=path), capsys)

def without_weights(folder):
    (folder / "model.safetensors").unlink()

def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])

def with_another_layer(folder):
    edit(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)

def wider(folder):
    edit(folder / "config.json", intermediate_size=64)

def of_other_tokens(folder):
    text = (folder / "tokenizer.json").read_text()
    for a, b in ("01", "23", "45"):
        text = text.replace(f'"{a}"', '"?"').replace(f'"{b}"', f'"{a}"').replace('"?"', f'"{b}"')
    (folder / "tokenizer.json").write_text(text)

def test_a_quantized_student_is_refused_in_words(pair, tmp_path, capsys, a_copy):
    edit(a_copy / "config.json", quantization_config={"quant_method": "fp8"})
    said = refusal(flags(pair, tmp_path / "out", student=a_copy), capsys)
    assert "its weights are quantized" in said

def test_models_that_list_no_end_of_sequence_are_refused(pair, tmp_path, capsys, a_copy):
    edit(a_copy / "config.json", eos_token_id=None)
    edit(a_copy / "generation_config.json", eos_token_id=None)
    edit(a_copy / "tokenizer_config.json", eos_token=None)
    argv = flags(pair, tmp_path / "out", student=a_copy, teacher=a_copy)
    assert "no eos_token_id of the models" in refusal(argv, capsys)

@pytest.mark.parametrize("damage,said", [
    (without_weights, "teacher "),
    (cut_weights, "teacher "),
    (with_another_layer, "it lacks the weights"),
    (wider, "teacher "),
    (of_other_tokens, "teacher: 6 of the student's 16 ids mean other tokens, e.g. "
                      "[(0, '0', '1'), (1, '1', '0')]; the models must share a tokenizer"),
])
def test_a_bad_checkpoint_is_refused(pair, tmp_path, capsys, a_copy, damage, said):
    damage(a_copy)
    assert said in refusal(flags(pair, tmp_path / "out", teacher=a_copy), capsys)

@pytest.mark.parametrize("change", [lambda logits: logits / 2, lambda logits: logits * math.nan])
def test_a_model_that_scales_its_logits_fails_the_self_test(
        pair, tmp_path, monkeypatch, capsys, change):
    forward = Qwen3ForCausalLM.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", changed)
    assert "student is not supported" in refusal(flags(pair, tmp_path / "out"), capsys)

# --- The run's folder and its checkpoints --------------------------------------------------------

@pytest.fixture
def out(tmp_path):
    """The output folder of a run, which makes it."""
    return tmp_path / "out"

@pytest.fixture(scope="session")
def whole(pair, tmp_path_factory):
    """The folder of a run of three steps that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(pair, folder, busy(pair))
    return folder

def busy(pair):
    """Settings with an evaluation and a checkpoint after each step."""
    return {"save_every": 1, "eval_every": 1, "eval_prompts": pair / "prompts.jsonl"}

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

@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_the_trained_student_with_its_own_files_and_loads_with_transformers(
        pair, tmp_path, out, tied):
    student = tmp_path / "student"
    save_model(student, 5, tie_word_embeddings=tied)
    edit(student / "config.json", written_by="transformers 4")
    edit(student / "generation_config.json", eos_token_id=15, top_k=7)
    (student / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (student / "pytorch_model.bin").write_bytes(b"the weights in another format")
    os.umask(0o022)
    run = loaded(pair, out, student=student)
    f.train_step(run)
    f.save_checkpoint(run)
    before, after = load_file(student / "model.safetensors"), weights_of(out)
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) is not tied
    for name, weight in after.items():
        assert not torch.equal(weight, before[name]), name  # all of it is trained
    folder = f.checkpoints(out)[0]
    ids = torch.tensor([[1, 2, 10, 12]])
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, run.student.model(ids).logits)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (student / name).read_bytes(), name
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["top_k"]) == ([14, 15], 7)
    assert not (folder / "pytorch_model.bin").exists()
    # Servers load every .safetensors of a folder as weights: the optimizer must not be one.
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path  # readable by others

def test_the_two_newest_checkpoints_are_kept(whole):
    assert names_in(whole) == ["checkpoint-000002", "checkpoint-000003"]

def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(pair, whole, out, capsys):
    train(pair, out, busy(pair), steps=1)
    # What a kill may leave: rows of a step that was not saved, and half a line.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1}\n{"step": 2, "lo')
    (out / "checkpoint-000002.partial").mkdir()
    train(pair, out, busy(pair), resume=True)
    assert "warning: steps was 1, is 3" in capsys.readouterr().out
    assert not list(out.glob("*.partial"))
    assert_same_run(whole, out)

def test_resume_with_nothing_to_resume_starts_the_run(pair, whole, out, monkeypatch):
    """So a job that may be requeued has one command; also if it died before its first save."""

    def die():
        raise ZeroDivisionError("a fault of ours is no mistake of the user's")

    with monkeypatch.context() as patch:
        in_step(1, die, patch)
        with pytest.raises(ZeroDivisionError):
            train(pair, out, busy(pair), resume=True)
    train(pair, out, busy(pair), resume=True)
    assert_same_run(whole, out)

def test_the_settings_of_a_run_continue_it_wherever_its_folder_lies(pair, whole, out):
    shutil.copytree(whole, out)
    f.main(["--config", str(out / "config.json"), "--resume"])  # all of its steps are done
    assert_same_run(whole, out)
    f.main(["--config", str(out / "config.json"), "--resume", "--steps", "4"])
    assert log_of(out)[-1]["step"] == 4
    assert log_of(whole)[-1]["step"] == 3

def test_a_folder_that_holds_a_run_is_not_taken_by_another(pair, whole, capsys):
    said = refusal(flags(pair, whole), capsys)
    assert "run exists: add --resume, or change --output-dir" in said

def test_a_folder_that_is_no_run_is_not_resumed_in(pair, a_copy, capsys):
    before = (a_copy / "config.json").read_bytes()
    said = refusal(flags(pair, a_copy, resume=True), capsys)
    assert "config.json is not the config of a run" in said
    assert (a_copy / "config.json").read_bytes() == before

def test_a_run_is_not_continued_with_another_student_or_the_tiny_pair(
        pair, whole, a_copy, capsys):
    before = (whole / "config.json").read_bytes()
    for argv in (flags(pair, whole, student=a_copy, resume=True),
                 ["--output-dir", str(whole), "--resume"]):
        assert "config.json is of a run with --student" in refusal(argv, capsys)
    assert (whole / "config.json").read_bytes() == before
    assert names_in(whole) == ["checkpoint-000002", "checkpoint-000003"]

def test_a_start_that_fails_leaves_the_folder_as_it_was(pair, tmp_path, out, capsys):
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": 5}])
    refusal(flags(pair, out, prompts=bad), capsys)
    assert not out.exists()
    train(pair, out, steps=1)
    settings = (out / "config.json").read_text()
    rows = log_of(out)
    refusal(flags(pair, out, prompts=bad, resume=True, steps=2, lr=1), capsys)
    assert (out / "config.json").read_text() == settings
    assert log_of(out) == rows

def test_a_first_start_with_a_broken_student_does_not_bind_the_folder_to_it(
        pair, out, a_copy, capsys):
    cut_weights(a_copy)
    assert "student " in refusal(flags(pair, out, student=a_copy), capsys)
    train(pair, out, steps=1, resume=True)
    assert names_in(out) == ["checkpoint-000001"]

def test_a_folder_in_which_nothing_can_be_renamed_is_refused_at_the_start(
        pair, out, monkeypatch, capsys):
    """Such as a bucket that is mounted as a folder."""

    def rename(*args):
        raise OSError("Function not implemented")

    monkeypatch.setattr(Path, "rename", rename)
    assert "output folder" in refusal(flags(pair, out), capsys)

def test_resume_takes_the_learning_rate_and_the_decay_of_the_command(pair, whole, out):
    shutil.copytree(whole, out)
    run = loaded(pair, out, resume=True, lr=0.25, weight_decay=0.5)
    f.train_step(run)
    for group in run.optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    assert len(run.optimizer.state) > 0

def test_a_kill_during_the_last_evaluation_is_made_up_for_on_resume(pair, whole, out, monkeypatch):
    evaluate = f.evaluate

    def last_dies(run):
        if run.step == 3:
            raise ZeroDivisionError
        evaluate(run)

    with monkeypatch.context() as patch:
        patch.setattr(f, "evaluate", last_dies)
        with pytest.raises(ZeroDivisionError):
            train(pair, out, busy(pair))
    assert names_in(out)[-1] == "checkpoint-000002"
    train(pair, out, busy(pair), resume=True)
    assert_same_run(whole, out)

def test_a_damaged_checkpoint_is_one_line(pair, whole, out, capsys):
    shutil.copytree(whole, out)
    (f.checkpoints(out)[-1] / "training.pt").write_bytes(b"")
    said = refusal(flags(pair, out, resume=True, steps=4, **busy(pair)), capsys)
    assert "checkpoint-000003" in said

# --- Processes -----------------------------------------------------------------------------------

def command(argv, ranks=1, file=FILE, env={}):
    """The command in processes of its own."""
    launcher = [sys.executable, str(file)]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(ranks), str(file)]
    return subprocess.Popen(launcher + argv, env=CPU | env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)

def wait_for_steps(folder, count):
    """Wait until a run has logged so many rows."""
    deadline = time.time() + 60
    path = folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.time() < deadline
        time.sleep(0.01)

@slow
def test_a_kill_loses_nothing_but_time(pair, tmp_path, out):
    """A process that is killed and resumed ends where one ends that was left alone."""
    settings = {"steps": 60, "save_every": 5, "batch_size": 4, "max_new_tokens": 6}
    for rows in (3, 25):
        run = command(flags(pair, out, resume=True, **settings))
        wait_for_steps(out, rows)
        run.kill()
        run.communicate()
    train(pair, out, settings, resume=True)
    train(pair, tmp_path / "whole", settings)
    assert_same_run(tmp_path / "whole", out)

@slow
@pytest.mark.parametrize("settings", [
    {"batch_size": 12, "micro_batch_tokens": 60},
    # Of one kept trajectory one rank has nothing; responses are longer than a segment.
    {"shard": True, "gradient_checkpointing": True, "filter_percentile": 90, "max_new_tokens": 70},
], ids=["DDP", "FSDP"])
def test_two_ranks_are_the_same_run_as_one(pair, tmp_path, settings):
    routed = pair / "routed.jsonl"
    held_out = routed.read_text().splitlines(keepends=True)[:9]  # nine: 5 and 4 on two ranks
    (tmp_path / "eval.jsonl").write_text("".join(held_out))
    settings = settings | {
        "teacher": [f"one={pair / 'teacher'}", f"two={pair / 'other'}"], "prompts": routed,
        "eval_prompts": tmp_path / "eval.jsonl", "save_every": 2, "lr": 1e-3}
    one, two = tmp_path / "one", tmp_path / "two"
    run = command(flags(pair, two, **settings), ranks=2)
    settings.pop("shard", None)  # which is for several ranks
    train(pair, one, settings)
    text, _ = run.communicate()
    assert run.returncode == 0, text
    assert text.count("step 3: eval: ") == 1  # rank 0 alone prints
    assert_same_metrics(log_of(one), log_of(two), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(weights_of(one), weights_of(two), rtol=1e-3, atol=1e-4)
    # One rank goes on with what two have saved.
    train(pair, one, settings, resume=True, steps=4)
    train(pair, two, settings, resume=True, steps=4)
    assert_same_metrics(log_of(one), log_of(two), rel=1e-3, abs=1e-4)

@slow
def test_a_late_rank_takes_the_folder_and_a_sharded_step_may_keep_nothing(pair, tmp_path, out):
    file = tmp_path / "late.py"
    file.write_text(f"""
import sys, time
sys.path.insert(0, {str(FILE.parent)!r})
import fire_opd as f
broadcast = f.broadcast
def late(value):
    value = broadcast(value)
    time.sleep(0.5 * f.RANK)
    return value
f.broadcast = late
f.filter_trajectories = lambda scores, percentile: scores > 1e9
f.main(sys.argv[1:])
""")
    argv = flags(pair, out, steps=1, shard=True)
    run = command(argv, ranks=2, file=file)
    text, _ = run.communicate()
    assert run.returncode == 0, text
    assert log_of(out)[-1]["skipped_updates"] == 1
    run = command(argv, ranks=2, file=file)
    text, _ = run.communicate()
    assert run.returncode != 0
    assert text.count("exists: add --resume") >= 1

@slow
def test_a_tiny_run_makes_its_pair_once_and_goes_on(tmp_path, out, capsys):
    settings = json.loads(FILE.with_name("tiny_config.json").read_text())
    settings["batch_size"] = 8
    settings["tiny"]["pretrain_steps"] = 1
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    argv = ["--config", str(tmp_path / "tiny.json"), "--output-dir", str(out), "--task", "single"]
    f.main([*argv, "--steps", "1"])
    assert "the tiny student:" in capsys.readouterr().out
    f.main([*argv, "--steps", "2", "--resume"])
    assert "the tiny student:" not in capsys.readouterr().out  # it is not made again
    f.main(["--config", str(out / "config.json"), "--steps", "3", "--resume"])
    assert names_in(out) == ["checkpoint-000002", "checkpoint-000003"]

# --- The README ----------------------------------------------------------------------------------

def test_the_readme_shows_train_step_as_it_is_and_flags_that_exist():
    readme = FILE.with_name("README.md").read_text(encoding="utf-8")
    assert inspect.getsource(f.train_step) in readme
    flags = set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", readme)) - {"nproc-per-node"}
    assert len(flags) > 10
    assert flags <= {name.replace("_", "-") for name in vars(f.Config())} | {"help"}

# --- A GPU: these skip themselves where there is none; all others run on the CPU -----------------

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

@pytest.fixture
def gpu(monkeypatch):
    """In these tests runs are on the GPU."""
    monkeypatch.setattr(f, "DEVICE", "cuda")

@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_a_captured_graph_draws_the_tokens_of_eager_decoding(gpu, pair, out, dtype):
    run = loaded(pair, out, dtype=dtype, max_new_tokens=40)
    run.student.segment = 8  # after which rows leave, and one more graph is captured
    uniforms = f.stateless_uniforms(KEY, range(12), 40)
    captured = run.student.sample(ids_of(run, 12), uniforms)
    run.student.use_cuda_graph = False
    eager = run.student.sample(ids_of(run, 12), uniforms)
    response = f.mask_responses(eager[0], run.student.eos_ids)
    assert len(response.sum(1).unique()) > 3  # rows of many lengths
    assert torch.equal(captured[0][response], eager[0][response])
    for ours, theirs in zip(captured[1:], eager[1:]):  # log pi and H
        torch.testing.assert_close(ours[response], theirs[response], rtol=1e-4, atol=1e-5)

@needs_gpu
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-3), ("bfloat16", 0.1)])
def test_on_a_gpu_the_gradient_is_the_cpus_up_to_rounding(
        gpu, pair, tmp_path, monkeypatch, dtype, tolerance):
    settings = {"batch_size": 32, "max_grad_norm": 1e9}
    with monkeypatch.context() as patch:
        patch.setattr(f, "DEVICE", "cpu")
        run = loaded(pair, tmp_path / "cpu", **settings)
        expected = graded_step(run)
        gradients, _ = gradient(run, expected)
    run = loaded(pair, tmp_path / "gpu", dtype=dtype, **settings)
    on_gpu, _ = gradient(run, expected)
    for name, there in gradients.items():
        distance = (on_gpu[name].cpu() - there).norm()
        assert distance <= tolerance * there.norm() + 1e-5, name

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
