"""The tests as a second tutorial, in the order of fire_opd.py, each named as a sentence about the method: formulas
against examples worked by hand, naive float64 loops, enumeration and finite differences; offline, on a CPU."""

import copy, functools, itertools, json, math, multiprocessing, os, re, shutil, signal, socket, subprocess, sys, time

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from types import SimpleNamespace
import transformers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import fire_opd as f

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(f.__file__))
FILE = os.path.join(HERE, "fire_opd.py")
f.DEVICE, CPU = "cpu", os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the last section turns to the GPU

# --- The method ---------------------------------------------------------------------------------------------
def random_case(seed, B=5, T=9, dtype=torch.float64):
    """Random entropies, log-probs and left-aligned masks; row 0 is empty, row 1 has a single token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0], lengths[1] = 0, 1
    mask = torch.arange(T) < lengths[:, None]
    rand = lambda: torch.rand(B, T, generator=g, dtype=torch.float64).to(dtype)
    return mask, rand(), rand(), -3 * rand(), -3 * rand()

def test_the_response_mask_ends_with_the_first_eos_whatever_the_padding():
    eos, pad, other = 2, 2, 3  # pad == eos, and a second EOS id
    tokens = torch.tensor([[5, 5, eos, pad, pad], [5, other, 5, eos, pad], [5, 5, 5, 5, 5], [eos, eos, 5, 5, 5]])
    assert f.response_mask(tokens, {eos, other}).sum(1).tolist() == [3, 2, 5, 1]
    assert f.response_mask(tokens, set()).all()

def test_the_score_is_the_mean_teacher_log_prob_of_the_response():
    log_probs = torch.tensor([[-1.0, -3.0, -99.0], [-2.0, math.nan, math.nan], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert f.trajectory_scores(log_probs, mask).tolist() == [-2.0, -2.0, -math.inf]  # (-1 - 3) / 2, -2 / 1, nothing to judge
    assert f.trajectory_scores(log_probs, torch.ones(3, 3))[1].isnan()
    assert f.trajectory_scores(log_probs.double(), mask).dtype == torch.float64
    assert f.trajectory_scores(log_probs.bfloat16(), mask).dtype == torch.float32

def test_the_filter_drops_the_lowest_fifth():
    scores = torch.arange(10.0)  # the 20 % quantile, interpolated, is 1.8
    assert f.filter_trajectories(scores, 20).tolist() == [False] * 2 + [True] * 8

@pytest.mark.parametrize("seed", range(20))
def test_the_filter_threshold_is_numpys_quantile(seed):
    rng = np.random.default_rng(seed)
    scores, percentile = rng.normal(size=rng.integers(1, 40)), float(rng.uniform(0, 100))
    scores[rng.random(len(scores)) < 0.2] = rng.choice([np.nan, -np.inf])
    finite = np.isfinite(scores)
    expected = finite & (scores >= np.quantile(scores[finite], percentile / 100)) if finite.any() else finite
    assert f.filter_trajectories(torch.tensor(scores), percentile).tolist() == expected.tolist()

def test_the_filter_keeps_ties_and_never_what_has_no_score():
    keep = lambda scores, p: f.filter_trajectories(torch.tensor(scores), p).tolist()
    assert keep([1.0, 1.0, 1.0, 2.0], 50) == [True] * 4  # ties with the threshold stay
    assert keep([-7.0], 20) == keep([-7.0], 100) == [True]  # a quantile of one number is that number
    assert keep([3.0, -math.inf, math.nan, 1.0], 0) == [True, False, False, True]
    assert keep([3.0, 2.0, 3.0], 100) == [True, False, True]
    assert keep([math.nan, -math.inf], 20) == [False, False] and keep([], 20) == []
    for n, p in itertools.product(range(2, 60), (5, 7, 20, 35, 70)):  # a score that is the quantile is kept
        scores, rank = torch.arange(n, dtype=torch.float64).sin().sort().values, p * (n - 1) / 100
        if rank == int(rank):
            assert f.filter_trajectories(scores, p).sum() == n - int(rank)
    assert f.filter_trajectories(torch.arange(1001, dtype=torch.float64), 16.1).sum() == 1001 - 161
    close = torch.tensor([1.0, 1.0 + 2 ** -23])  # two neighbouring floats: their middle is compared in float64
    assert f.filter_trajectories(close, 40).tolist() == [False, True]
    for bad in (-1, 100.1, math.nan):
        with pytest.raises(ValueError, match="percentile"):
            f.filter_trajectories(torch.zeros(3), bad)

def test_weights_of_three_tokens_worked_by_hand():
    teacher_entropy = torch.tensor([[0.0, 1.0, 2.0]])  # sure, less sure, unsure: c = 1 - H / 2 = 1, 1/2, 0
    student_entropy = torch.tensor([[2.0, 1.0, 0.0]])  # unsure, less, sure:      u = H / 2     = 1, 1/2, 0
    # (1 + c)(1 + u) = 2 * 2, 3/2 * 3/2, 1 * 1 = 4, 9/4, 1, whose mean is 29/12
    weights = f.token_weights(teacher_entropy, student_entropy, torch.ones(1, 3))
    torch.testing.assert_close(weights, torch.tensor([[4.0, 9 / 4, 1.0]]) * 12 / 29)

def naive_weights(teacher_entropy, student_entropy, mask, alpha, beta):
    """The formula, token by token, in Python floats."""
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        if tokens:
            top_t = max(teacher_entropy[b, t].item() for t in tokens) or 1
            top_s = max(student_entropy[b, t].item() for t in tokens) or 1
            w = [(1 + alpha * (1 - teacher_entropy[b, t].item() / top_t))
                 * (1 + beta * student_entropy[b, t].item() / top_s) for t in tokens]
            for t, value in zip(tokens, w):
                weights[b, t] = value * len(w) / sum(w)
    return weights

@pytest.mark.parametrize("seed", range(12))
def test_weights_are_the_formula_and_average_to_one_in_each_trajectory(seed):
    mask, teacher, student, *_ = random_case(seed)
    alpha, beta = (float(x) for x in np.random.default_rng(seed).uniform(0, 3, 2))
    student.requires_grad_(True)
    weights = f.token_weights(teacher, student, mask, alpha, beta)
    torch.testing.assert_close(weights, naive_weights(teacher, student, mask, alpha, beta))
    torch.testing.assert_close(weights.sum(1), mask.sum(1).double())
    assert not weights.requires_grad and (weights[~mask] == 0).all()
    single = f.token_weights(teacher.float(), student.float(), mask, alpha, beta)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), weights, rtol=1e-5, atol=1e-6)
    order = torch.randperm(mask.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(f.token_weights(teacher[:, order], student[:, order], mask[:, order], alpha, beta),
                               weights[:, order])
    # batch scope: one row made of all valid tokens
    pooled = f.token_weights(teacher[mask][None], student[mask][None], torch.ones(1, int(mask.sum())), alpha, beta)
    torch.testing.assert_close(f.token_weights(teacher, student, mask, alpha, beta, scope="batch")[mask], pooled[0])

def test_weights_rise_with_teacher_confidence_and_student_confusion():
    entropy, flat, mask = torch.linspace(0, 2, 7)[None], torch.ones(1, 7), torch.ones(1, 7)
    assert (f.token_weights(entropy, flat, mask).diff() < 0).all()
    assert (f.token_weights(flat, entropy, mask).diff() > 0).all()
    assert (f.token_weights(entropy, entropy, mask, 0.0, 0.0) == 1).all()

def test_weights_do_not_see_what_is_off_the_mask():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    junk = torch.tensor([[0.0, 0.0, math.nan], [math.nan, math.inf, 1.0]])
    assert f.token_weights(junk, junk, mask).tolist() == [[1, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="scope"):
        f.token_weights(junk, junk, mask, scope="token")

def test_the_loss_of_two_tokens_worked_by_hand():
    old, teacher = torch.tensor([[-2.0, -1.0]]), torch.tensor([[-1.0, -3.0]])  # A = 1, -2: praised, blamed
    weights, mask = torch.tensor([[1.5, 0.5]]), torch.ones(1, 2)  # w A = 3/2, -1
    loss = lambda new: f.policy_loss(new, old, teacher, weights, mask, 2).item()
    assert loss(old) == pytest.approx(-(1.5 - 1) / 2)  # r = 1: minus the weighted mean advantage
    doubled = old + math.log(2)  # r = 2: the praised token is clipped at 1.2, the blamed one is not
    assert loss(doubled) == pytest.approx(-(1.2 * 1.5 - 2 * 1) / 2)
    halved = old - math.log(2)  # r = 1/2: now the blamed one is clipped, at 0.8
    assert loss(halved) == pytest.approx(-(0.5 * 1.5 - 0.8 * 1) / 2)
    same = old.clone().requires_grad_(True)  # old is this very pass: its copy is detached, the gradient is - w A / 2
    f.policy_loss(same, same, teacher, weights, mask, 2).backward()
    assert same.grad.tolist() == [[-0.75, 0.5]]

@pytest.mark.parametrize("seed", range(8))
def test_the_loss_is_the_clipped_objective_token_by_token(seed):
    mask, weights, noise, old, teacher = random_case(seed)
    new = (old + 0.6 * (noise - 0.5)).requires_grad_(True)
    loss, expected = f.policy_loss(new, old, teacher, weights, mask, 17, clip_ratio=0.2), 0.0
    for b, t in mask.nonzero().tolist():
        ratio, weighted = math.exp(new[b, t].item() - old[b, t]), weights[b, t] * (teacher[b, t] - old[b, t])
        expected -= min(ratio * weighted, min(max(ratio, 0.8), 1.2) * weighted) / 17
    assert loss.item() == pytest.approx(float(expected), rel=1e-12)
    loss.backward()
    for b, t in mask.nonzero().tolist()[:5]:  # finite differences
        step = torch.zeros_like(old)
        step[b, t] = 1e-6
        at = lambda x: f.policy_loss(x, old, teacher, weights, mask, 17).item()
        slope = (at(new.detach() + step) - at(new.detach() - step)) / 2e-6
        assert new.grad[b, t].item() == pytest.approx(slope, abs=1e-7)
    assert (new.grad[~mask] == 0).all()

def test_infinities_off_the_mask_leave_loss_and_gradient_finite():
    new = torch.tensor([[-1.0, math.inf, math.nan]], requires_grad=True)
    loss = f.policy_loss(new, torch.tensor([[-1.0, -math.inf, 0]]), torch.tensor([[-2.0, math.nan, math.inf]]),
                         torch.tensor([[1.0, math.inf, math.nan]]), torch.tensor([[1, 0, 0]]), 1)
    loss.backward()
    assert loss.item() == 1 and new.grad.tolist() == [[1, 0, 0]]

def test_the_expected_gradient_of_the_loss_is_that_of_the_reverse_kl():
    """All responses of two tokens from a vocabulary of four, each weighed by its probability."""
    torch.manual_seed(0)
    V = 4
    student, teacher = torch.randn(1 + V, V, dtype=torch.float64), torch.randn(1 + V, V, dtype=torch.float64)
    student.requires_grad_(True)  # row 0: first token; row 1 + y_1: second token
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    estimate = 0
    for y1, y2 in itertools.product(range(V), repeat=2):
        s, t = (torch.stack([table[0, y1], table[1 + y1, y2]])[None] for table in (log_s, log_t))
        probability = s.sum().exp().detach()
        estimate = estimate + probability * f.policy_loss(s, s.detach(), t, torch.ones(1, 2), torch.ones(1, 2), 1)
    kl = (log_s.exp() * (log_s - log_t)).sum(1)  # of each context; the contexts' own probabilities are held fixed
    exact = kl[0] + (log_s[0].exp().detach() * kl[1:]).sum()
    (got,), (wanted,) = torch.autograd.grad(estimate, student, retain_graph=True), torch.autograd.grad(exact, student)
    torch.testing.assert_close(got, wanted)
    assert estimate.item() == pytest.approx(exact.item())  # and the loss is the estimate of the divergence itself

@pytest.mark.parametrize("chunk,temperature", [(1, 1.0), (3, 0.7), (128, 1.9)])
def test_log_probs_and_entropy_in_chunks_are_those_of_whole_logits(chunk, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets, upstream = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    hidden.requires_grad_(True), weight.requires_grad_(True)
    log_probs, entropy = f.token_log_probs_and_entropy(hidden, weight, targets, temperature, chunk)
    table = (hidden @ weight.T / temperature).log_softmax(1)
    expected = table.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(1))
    assert not entropy.requires_grad and log_probs.dtype == torch.float64
    got = torch.autograd.grad(log_probs @ upstream, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(expected @ upstream, (hidden, weight)))
    assert torch.autograd.gradcheck(lambda h, w: f.token_log_probs_and_entropy(h, w, targets, temperature, chunk)[0],
                                    (hidden, weight))
    single, _ = f.token_log_probs_and_entropy(hidden.float(), weight.float(), targets, temperature, chunk)
    torch.testing.assert_close(single.double(), log_probs, rtol=1e-5, atol=1e-5)
    half, _ = f.token_log_probs_and_entropy(hidden.bfloat16(), weight.bfloat16(), targets, temperature, chunk)
    assert half.dtype == torch.float32

def test_in_bf16_only_the_products_are_rounded():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, grads = torch.randint(0, 50, (9,)), []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            log_probs, entropy = f.token_log_probs_and_entropy(hidden, weight, targets, 0.8, 4)
        assert log_probs.dtype == entropy.dtype == torch.float32  # a softmax in bf16 would be off by per cents
        grads.append(torch.autograd.grad(log_probs.sum(), (hidden, weight)))
    for exact, rounded in zip(*grads):
        assert rounded.dtype == torch.float32 and 0 < (exact - rounded).norm() < 0.02 * exact.norm()

class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out

def test_no_tensor_of_tokens_times_vocabulary_is_ever_whole():
    N, V, D, chunk = 64, 1000, 8, 4
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with LargestTensor() as largest:
        log_probs, _ = f.token_log_probs_and_entropy(hidden, weight, torch.zeros(N, dtype=torch.long), 1.0, chunk)
        log_probs.sum().backward()
    assert largest.elements <= max(chunk * V, V * D) < N * V

def test_sampling_follows_the_softmax():
    torch.manual_seed(0)
    logits, n = torch.randn(1, 12) * 2, 20000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(n))
    tokens, log_probs, entropy = f.sample_tokens(logits.expand(n, -1), uniforms, temperature=0.8)
    p = (logits[0] / 0.8).softmax(0)
    torch.testing.assert_close(log_probs, p[tokens].log())
    torch.testing.assert_close(entropy[:1], -(p * p.log()).sum()[None])
    counts = torch.bincount(tokens, minlength=12)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 31.3  # chi-squared, 11 degrees of freedom, 99.9 %

def test_sampling_at_the_ends_of_the_unit_interval_gives_tokens_that_exist():
    logits = torch.full((3, 151936), -20.0)
    logits[:, 0] = logits[:, -1] = -math.inf
    uniforms = torch.tensor([0.0, 1 - 2 ** -53, 0.5], dtype=torch.float64)
    tokens, log_probs, _ = f.sample_tokens(logits, uniforms)
    assert tokens[0] == 1 and tokens[1] == 151934 and log_probs.isfinite().all()
    assert f.sample_tokens(torch.full((1, 4), math.nan), uniforms[:1])[1].isnan()  # no crash: the loss will tell
    assert f.sample_tokens(torch.tensor([[0.0, 50.0, -math.inf]]), uniforms[1:2])[0].item() == 1

def test_sampling_scales_uniforms_by_the_end_of_the_sum():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    cdf = logits.softmax(1).cumsum(1, dtype=torch.float64)[0]
    assert cdf[-1] != 1  # float32 probabilities
    uniforms = (cdf + cdf / cdf[-1])[2000:4000] / 2  # each between an edge of the sum and that of the distribution
    tokens, _, _ = f.sample_tokens(logits.expand(2000, -1), uniforms)
    assert torch.equal(tokens, torch.searchsorted(cdf / cdf[-1], uniforms, right=True))

# --- A random pair as checkpoint folders --------------------------------------------------------------------
SMALL = dict(vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             initializer_range=0.3, eos_token_id=14, pad_token_id=13, bos_token_id=None)

def save_model(folder, seed, hidden=32, **config):
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL | dict(hidden_size=hidden, head_dim=16, tie_word_embeddings=True) | config))
    model.save_pretrained(folder)
    f.tiny_tokenizer().save_pretrained(folder)
    return model

def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A random student, two random teachers and prompts: 20 embedding rows for 16 tokens, as real ones are padded."""
    root = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("student", "teacher", "other")):
        save_model(root / name, seed)
    rng = np.random.default_rng(0)
    rows = [dict(prompt="".join(map(str, rng.integers(0, 10, rng.integers(3, 9)))) + "+=", answer="12",
                 group="ab"[i % 2]) for i in range(40)]
    write_rows(root / "prompts.jsonl", rows)
    write_rows(root / "routed.jsonl", [row | {"teacher": ("one", "two")[i % 2]} for i, row in enumerate(rows)])
    return root

def flags(pair, out, **settings):
    defaults = dict(teacher=pair / "teacher", student=pair / "student", prompts=pair / "prompts.jsonl", output_dir=out,
                    steps=3, batch_size=6, max_new_tokens=10, lr=1e-2, dtype="float32")
    argv = []
    for name, value in (defaults | settings).items():
        name = "--" + name.replace("_", "-")
        argv += [name] if value is True else [x for v in value for x in (name, v)] if isinstance(value, list) else [name, value]
    return [str(x) for x in argv]

def loaded(pair, out, **settings):
    """A Run ready to step, in this process."""
    config = f.parse_config(flags(pair, out, **settings))
    f.set_up(config)
    return f.load(config)

def log_of(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]

def same_metrics(a, b, **tolerance):
    """Whether two logs agree in everything but times and memory."""
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert left.keys() == right.keys()
        for name in left:
            if not re.match("seconds|tokens_per|mfu|peak", name):
                assert left[name] == right[name] or left[name] == pytest.approx(right[name], **tolerance), (left["step"], name)

def weights_of(folder):
    return load_file(os.path.join(f.checkpoints(folder)[-1], "model.safetensors"))

def moments_of(folder):
    return torch.load(os.path.join(f.checkpoints(folder)[-1], "optimizer.pt"), weights_only=True)["state"]

def scored_step(run):
    """A step of train_step up to its update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f, "update", lambda run, r: dict(loss=0.0))
        return f.train_step(run)[0]

def responses_of(r):
    """The response tokens of each row."""
    return [ids[mask].tolist() for ids, mask in zip(r.ids, r.response)]

def gradient(run, rollouts):
    """The gradient of a step before clipping: the optimizer is told to do nothing."""
    grads = {}
    run.optimizer.step = lambda: grads.update({n: p.grad.clone() for n, p in run.student.named_parameters()})
    metrics = f.update(run, rollouts)
    return grads, metrics

# --- Policies -----------------------------------------------------------------------------------------------
def test_a_hostile_generation_config_does_not_change_what_is_sampled(pair, tmp_path):
    shutil.copytree(pair / "student", tmp_path / "hostile")
    GenerationConfig(do_sample=True, top_k=2, top_p=0.3, temperature=0.2, repetition_penalty=3.0, eos_token_id=14,
                     no_repeat_ngram_size=1, suppress_tokens=[1, 2]).save_pretrained(tmp_path / "hostile")
    run = loaded(pair, tmp_path / "out", student=tmp_path / "hostile", temperature=1.3, max_new_tokens=1)
    ids, n = run.prompts[0].ids, 8000
    uniforms = torch.from_numpy(np.random.default_rng(1).random((n, 1)))
    tokens, log_probs, _ = run.student.sample([ids] * n, uniforms)
    p = (run.student.model(torch.tensor([ids])).logits[0, -1, :16].double() / 1.3).softmax(0).detach()
    counts = torch.bincount(tokens[:, 0], minlength=16)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 37.7  # chi-squared, 15 degrees of freedom, 99.9 %
    assert len(counts) == 16  # the four padded rows are never sampled
    torch.testing.assert_close(log_probs[:, 0].double(), p[tokens[:, 0]].log(), rtol=1e-4, atol=1e-5)
    f.save_checkpoint(run)
    assert GenerationConfig.from_pretrained(f.checkpoints(tmp_path / "out")[0]).top_k == 2  # it is saved as it was

def test_rollouts_depend_neither_on_segments_nor_on_batches_nor_on_padding(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", batch_size=12, max_new_tokens=20)
    whole = f.rollout(run, run.prompts[:12], f.SAMPLE, 0)
    assert len(set(whole.response.sum(1).tolist())) > 4  # long-tailed
    run.config.rollout_batch_size = 5
    monkeypatch.setattr(f.Policy, "SEGMENT", 3)
    parts = f.rollout(run, run.prompts[:12], f.SAMPLE, 0)
    assert torch.equal(whole.response, parts.response) and torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.log_probs, parts.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.student_entropy, parts.student_entropy, rtol=1e-4, atol=1e-5)
    other = f.rollout(run, run.prompts[:12], f.SAMPLE, 1)
    assert responses_of(other) != responses_of(whole)

def test_finished_rows_leave_the_batch(pair, tmp_path, monkeypatch):
    run, rows = loaded(pair, tmp_path / "out", batch_size=12, max_new_tokens=20), []
    monkeypatch.setattr(f.Policy, "SEGMENT", 2)
    forward = run.student.model.forward
    monkeypatch.setattr(run.student.model, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or forward(*a, **k))
    lengths = f.rollout(run, run.prompts[:12], f.SAMPLE, 0).response.sum(1)
    assert sum(rows) <= int((lengths + 1).sum()) < 12 * int(lengths.max())

# --- One step -----------------------------------------------------------------------------------------------
def test_uniforms_are_a_function_of_their_row_alone():
    table = f.uniforms(7, f.SAMPLE, 3, rows=range(6), width=4)  # seed 7, step 3
    assert table.dtype == torch.float64 and table.shape == (6, 4) and len(table.unique()) == 24
    assert torch.equal(f.uniforms(7, f.SAMPLE, 3, rows=[4, 1], width=4), table[[4, 1]])  # another rank, another batch
    for other in ((8, f.SAMPLE, 3), (7, f.EVALUATE, 3), (7, f.SAMPLE, 4)):
        assert not (f.uniforms(*other, rows=range(6), width=4) == table).any()

def test_every_prompt_is_met_once_an_epoch(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=32, rollouts_per_prompt=2)
    met = []
    for run.step in range(5):  # 5 steps of 16 prompts: two epochs of 40, the third in both
        prompts = f.step_prompts(run)
        assert all(prompts[i] is prompts[i + 1] for i in range(0, 32, 2))
        met += [id(p) for p in prompts[::2]]
    everyone = {id(p) for p in run.prompts}
    assert set(met[:40]) == set(met[40:]) == everyone and met[:40] != met[40:]

def test_each_step_draws_anew(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", prompts=write_rows(tmp_path / "one.jsonl", [dict(prompt="12+=")]), lr=1e-12)
    assert responses_of(f.train_step(run)[0]) != responses_of(setattr(run, "step", 1) or f.train_step(run)[0])

def test_each_row_is_scored_by_its_own_teacher(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", prompts=pair / "routed.jsonl",
                 teacher=[f"one={pair / 'teacher'}", f"two={pair / 'other'}"])
    rollouts = scored_step(run)
    assert {p.teacher for p in rollouts.prompts} == {"one", "two"}
    for i, prompt in enumerate(rollouts.prompts):
        model = Qwen3ForCausalLM.from_pretrained(pair / {"one": "teacher", "two": "other"}[prompt.teacher]).double()
        response = rollouts.ids[i][rollouts.response[i]]
        ids = torch.cat([torch.tensor(prompt.ids), response])
        assert torch.equal(ids, rollouts.ids[i, :len(ids)])  # one layout: prompt, response, padding
        table = model(ids[None]).logits[0, len(prompt.ids) - 1:-1, :16].log_softmax(1)
        expected = table.gather(1, response[:, None])[:, 0].float()
        torch.testing.assert_close(rollouts.teacher_log_probs[i][rollouts.response[i]], expected, rtol=1e-4, atol=1e-4)

def test_the_controls_keep_the_rate_the_mean_and_the_multiset_of_weights(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12)
    r = scored_step(run)
    keep, soft, mask, differs = r.keep, r.weights, r.response & r.keep[:, None], False
    for run.step in range(3):
        random = f.filter_trajectories(f.random_scores(run, r), run.config.filter_percentile)
        assert random.sum() == keep.sum()
        differs |= not torch.equal(random, keep)
    assert differs
    chosen = {}
    for kind in ("hard", "shuffled"):
        run.config.token_weights = kind
        chosen[kind] = f.control_weights(run, r)
        torch.testing.assert_close(chosen[kind].sum(1), mask.sum(1).float())
        assert (chosen[kind][~mask] == 0).all()
    assert not torch.equal(chosen["shuffled"], soft)
    for i in keep.nonzero()[:, 0].tolist():
        own, n = mask[i], int(mask[i].sum())
        assert torch.equal(chosen["shuffled"][i, own].sort().values, soft[i, own].sort().values)
        hard = chosen["hard"][i, own]
        assert (hard > 0).sum() == -(-n // 2)
        assert n == 1 or soft[i, own][hard > 0].min() >= soft[i, own][hard == 0].max()

def naive_step(run, rollouts, alpha=1.0, beta=1.0, percentile=20.0, seq_mean=False):
    """A whole step from the token ids in float64: full logits, loops, autograd; nothing of the file is used."""
    student = Qwen3ForCausalLM(run.student.model.config).double()
    student.load_state_dict({k: v.double() for k, v in run.student.model.state_dict().items()})
    teacher = copy.deepcopy(run.teachers["teacher"].model).double()
    T, rows = run.config.temperature, []
    for prompt, tokens, mask in zip(rollouts.prompts, rollouts.ids, rollouts.response):
        response, start = tokens[mask], len(prompt.ids) - 1
        ids = torch.cat([torch.tensor(prompt.ids), response])[None]
        s, t = ((model(ids).logits[0, start:-1, :16] / T).log_softmax(1) for model in (student, teacher))
        rows.append([x.gather(1, response[:, None])[:, 0] for x in (s, t)] + [-(x.exp() * x).sum(1) for x in (s, t)])
    scores = np.array([t.mean().item() for _, t, _, _ in rows])
    kept = [row for row, score in zip(rows, scores) if score >= np.quantile(scores, percentile / 100)]
    losses = []
    for s, t, h_s, h_t in kept:
        w = (1 + alpha * (1 - h_t / h_t.max())) * (1 + beta * h_s / h_s.max())
        w = (w / w.mean()).detach()
        losses.append(-(w * (t - s).detach() * s))  # d/d theta of r A at r = 1 is A d log pi
    loss = torch.stack([x.mean() for x in losses]).mean() if seq_mean else torch.cat(losses).mean()
    loss.backward()
    return {n: p.grad for n, p in student.named_parameters()}, len(kept)

@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.6, alpha=2.0, beta=0.3, filter_percentile=50.0),
                                      dict(loss_agg="seq-mean", filter_percentile=0.0)])
def test_a_whole_step_agrees_with_a_naive_float64_reference(pair, tmp_path, settings):
    run = loaded(pair, tmp_path / "out", batch_size=12, max_grad_norm=1e9, **settings)
    rollouts = scored_step(run)
    grads, metrics = gradient(run, rollouts)
    expected, kept = naive_step(run, rollouts, *(settings.get(k, d) for k, d in (
        ("alpha", 1.0), ("beta", 1.0), ("filter_percentile", 20.0))), settings.get("loss_agg") == "seq-mean")
    assert int(rollouts.keep.sum()) == kept
    for name, grad in expected.items():
        torch.testing.assert_close(grads["model." + name].double(), grad, rtol=1e-3, atol=1e-5)

def test_the_gradient_does_not_depend_on_the_micro_batches(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12, max_grad_norm=1e9)
    rollouts, seen, cuts = scored_step(run), [], []
    for budget in (10 ** 6, 60, 30, 1):
        run.config.micro_batch_tokens = budget
        seen.append(gradient(run, rollouts))
        cuts.append(len(f.micro_batches(rollouts.keep.nonzero()[:, 0].tolist(), rollouts.lengths, budget)))
    assert cuts[0] == 1 and cuts[-1] == int(rollouts.keep.sum()) and len(set(cuts)) == 4
    for grads, metrics in seen[1:]:
        assert metrics["loss"] == pytest.approx(seen[0][1]["loss"], rel=1e-5)
        for name in grads:
            torch.testing.assert_close(grads[name], seen[0][0][name], rtol=1e-4, atol=1e-6)

def test_without_filter_and_weights_it_is_plain_distillation_to_the_bit(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", batch_size=12, filter_percentile=0, alpha=0, beta=0, max_grad_norm=1e9)
    rollouts = scored_step(run)
    grads, _ = gradient(run, rollouts)
    assert rollouts.keep.all() and torch.equal(rollouts.weights, rollouts.response.float())
    run.student.zero_grad()
    rows = f.micro_batches(list(range(12)), rollouts.lengths, 8192)[0]
    ids, mask, teacher = rollouts.batch(rows, rollouts.ids, rollouts.response, rollouts.teacher_log_probs)
    log_probs, _ = run.student(ids, mask)
    advantages = torch.where(mask, teacher - log_probs.detach(), 0)
    (-((log_probs - log_probs.detach()).exp() * advantages).sum() / int(mask.sum())).backward()
    for name, p in run.student.named_parameters():
        assert torch.equal(p.grad, grads[name]), name

def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(pair, tmp_path):
    run = loaded(pair, tmp_path / "out", teacher=pair / "student")
    rollouts = scored_step(run)
    grads, metrics = gradient(run, rollouts)
    figures = f.measure_step(run, rollouts, [0, 1, 2, 3])
    assert abs(figures["reverse_kl"]) < 1e-5 and abs(figures["reverse_kl_kept"]) < 1e-6
    assert max(g.abs().max() for g in grads.values()) < 1e-5 and abs(metrics["loss"]) < 1e-6

def test_dropped_trajectories_never_enter_the_students_forward(pair, tmp_path, monkeypatch):
    run = loaded(pair, tmp_path / "out", batch_size=10, filter_percentile=60)
    rollouts, seen = scored_step(run), 0
    forward = run.student.forward

    def spy(ids, response):
        nonlocal seen
        seen += int(response.sum())
        return forward(ids, response)
    monkeypatch.setattr(run.student, "forward", spy)
    f.update(run, rollouts)
    assert int(rollouts.keep.sum()) == 4 and seen == int(rollouts.response[rollouts.keep].sum()) and not rollouts.weights[~rollouts.keep].any()

def test_the_old_policy_is_this_very_pass(pair, tmp_path, monkeypatch):
    seen, loss = [], f.policy_loss
    monkeypatch.setattr(f, "policy_loss", lambda *a: seen.append(a) or loss(*a))
    run = loaded(pair, tmp_path / "one", filter_percentile=0)
    f.update(run, scored_step(run))
    assert torch.equal(seen[0][0], seen[0][1]) and not seen[0][1].requires_grad

def test_gradient_checkpointing_changes_no_gradient(pair, tmp_path):
    grads = []
    for name, extra in (("a", {}), ("b", dict(gradient_checkpointing=True))):
        run = loaded(pair, tmp_path / name, **extra)
        calls, layer = [], run.student.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        rollouts = scored_step(run)
        calls.clear()
        grads.append(gradient(run, rollouts)[0])
        assert len(calls) == (2 if extra else 1)  # recomputed in backward
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])

def test_a_nan_rollout_is_dropped_and_a_nan_gradient_changes_nothing(pair, tmp_path):
    run = loaded(pair, tmp_path / "out")
    rollouts = scored_step(run)
    rollouts.teacher_log_probs[2, len(rollouts.prompts[2].ids)] = math.nan
    rollouts.scores = f.trajectory_scores(rollouts.teacher_log_probs, rollouts.response)
    rollouts.keep = f.filter_trajectories(rollouts.scores, 20)
    assert not rollouts.keep[2] and rollouts.keep.sum() >= 3
    metrics = f.update(run, rollouts)
    assert metrics["skipped_updates"] == 0 and math.isfinite(metrics["loss"])
    assert math.isfinite(f.measure_step(run, rollouts, [0, 1, 2, 3])["reverse_kl"])
    before = copy.deepcopy(run.student.state_dict())
    rollouts.keep[2] = True  # as if it had slipped through
    assert f.update(run, rollouts)["skipped_updates"] == 1
    rollouts.keep[:] = False  # and a step that keeps nothing
    assert f.update(run, rollouts)["skipped_updates"] == 1
    rollouts.keep[3], rollouts.log_probs[3, -1] = True, math.nan  # a sampler that went wrong is not trained on
    assert f.update(run, rollouts)["skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in run.student.state_dict().items())

# --- The run ------------------------------------------------------------------------------------------------
def test_steps_0_evaluates_and_writes_nothing(pair, tmp_path, capsys):
    f.main(flags(pair, tmp_path / "out", steps=0, eval_prompts=pair / "prompts.jsonl"))
    assert "step 0: evaluation" in capsys.readouterr().out and not (tmp_path / "out").exists()

def test_three_steps_without_a_finite_gradient_stop_the_run_with_its_weights_saved(pair, tmp_path, capsys, monkeypatch):
    calls = []
    loss = f.policy_loss
    monkeypatch.setattr(f, "policy_loss", lambda *a: calls.append(1) or loss(*a) * (math.nan if len(calls) > 1 else 1))
    with pytest.raises(SystemExit) as stop:
        f.main(flags(pair, tmp_path / "out", steps=9))
    assert stop.value.code == 2 and "three steps without" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "out").values())
    assert [row["skipped_updates"] for row in log_of(tmp_path / "out")] == [0, 1, 1, 1]

# --- Metrics and evaluation ---------------------------------------------------------------------------------
@pytest.mark.parametrize("response,answer,correct", [
    ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}", True), ("\\boxed{3} or \\boxed{4}", "3", False),
    ("The answer is $1,234.", "1234", True), ("12 apples, then 7", "12", False), ("blue", "blue", True),
    ("01358", "01358", True), ("\\boxed{1,2}", "12", False), ("it is 1/2", "2", False), ("it is 1/2", "1/2", True),
    ("\\boxed{1,234,567}", "1234567", True), ("\\boxed{", "3", False), ("", "3", False), ("It=18, so", "18", True), ("it is .5", "5", False), ("it is .5", "0.5", True),
    ("\\boxed{1\\,000}", "\\boxed{1{,}000}", True), ("\\boxed{1,\\!000}", "1000", True), ("\\boxed{\\dfrac12}", "so \\boxed{\\frac12}.", True), ("72%", "it is 72.\n#### 72", True),
    ("it is \u22125", "-5", True), ("it is \u22125", "5", False), ("\\boxed{\\$18.50}", "18.5", True), ("3", "3.0", True), ("\\boxed{\\text{no}}", "no", True),
    ("values are 1,2,3", "3", True), ("1,2,3", "123", False), ("it is 1,000", "1000", True), ("about 3-5", "5", True), ("\\boxed{\\left( 3, 4 \\right)}", "(3,4)", True)])
def test_an_answer_is_the_last_box_or_the_last_number_or_the_whole_response(response, answer, correct):
    assert f.is_correct(response, answer) is correct

def test_metrics_of_three_rollouts_worked_by_hand(pair, tmp_path):
    run = loaded(pair, tmp_path / "out")
    prompts = [f.Prompt([1], "12", "teacher", ""), f.Prompt([1], "3", "teacher", ""), f.Prompt([1], None, "teacher", "")]
    tokens = torch.tensor([[1, 2, 14], [4, 5, 14], [6, 6, 6]])
    r = f.lay_out(prompts, {14}, tokens, torch.full((3, 3), -1.0), torch.ones(3, 3))
    assert r.ids.tolist() == [[1, 1, 2, 14], [1, 4, 5, 14], [1, 6, 6, 6]] and r.lengths == [4, 4, 4]
    r.teacher_log_probs = torch.tensor([[0, -1.0, -1, -1], [0, -2, -2, -2], [0, -4, -4, -4]])
    r.teacher_entropy, r.scores = torch.ones(3, 4), torch.tensor([-1.0, -2, -4])
    figures = f.measure(run, r, {"": torch.tensor([True, True, True]), "/a": torch.tensor([False, True, False])})
    assert figures["reverse_kl/a"] == 1 and figures["score"] == pytest.approx(-7 / 3)
    assert figures["reverse_kl"] == pytest.approx(4 / 3) and figures["exact_match"] == 0.5
    assert figures["truncated_ratio"] == pytest.approx(1 / 3) and figures["response_length"] == 3
    r.keep = torch.tensor([True, True, False])
    r.weights = torch.tensor([[0, 2.0, 0.5, 0.5], [0, 1, 1, 1], [0, 0, 0, 0]])
    figures = f.measure_step(run, r, [0.0, 1, 2, 4])
    assert figures["weight_ess"] == pytest.approx(36 / 7.5 / 6) and figures["filter_threshold"] == -2
    assert figures["reverse_kl_kept"] == 0.5 and figures["keep_ratio"] == pytest.approx(2 / 3)
    assert figures["truncated_ratio_dropped"] == 1 and figures["exact_match_kept"] == 0.5
    assert figures["seconds_update"] == 2 and figures["tokens_per_second"] == 9 / 4
    assert math.isnan(figures["reverse_kl_dropped"]) is False and "exact_match_dropped" not in figures

# --- Settings -----------------------------------------------------------------------------------------------
def test_the_command_line_wins_over_json_and_json_over_defaults(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(dict(teacher="t", student="s", prompts="p", lr=0.5, seed=7)))
    config = f.parse_config(["--config", str(path), "--seed", "8"])
    assert (config.seed, config.lr, config.batch_size) == (8, 0.5, 64)

def test_the_defaults_of_a_real_run_are_those_of_the_method():
    c = f.parse_config(["--teacher", "t", "--student", "s", "--prompts", "p"])
    assert (c.filter_percentile, c.alpha, c.beta, c.temperature) == (20, 1, 1, 1)
    assert (c.lr, c.weight_decay, c.max_grad_norm, c.loss_agg) == (1e-6, 0.01, 1, "token-mean")
    assert c.tiny is None and c.filter_by == "likelihood" and c.token_weights == "soft"

def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        f.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all("--" + name.replace("_", "-") in text for name in f.SETTINGS if name != "tiny")
    assert all(f"[{setting.default}]" in text for setting in f.SETTINGS.values() if setting.default)

def test_what_is_printed_cannot_move_the_cursor(pair, tmp_path, capsys):
    assert f.visible("a\x1b[2Jb\r\n\u202e") == "a\\x1b[2Jb\\r\n\\u202e"
    f.say("x\x1b[31m")
    assert "\x1b" not in capsys.readouterr().out

# --- Prompts and models -------------------------------------------------------------------------------------
def test_prompts_are_strings_or_messages_and_go_through_the_template(tmp_path):
    tokenizer, config = f.tiny_tokenizer(), f.Config(max_prompt_tokens=20)

    def read(rows):
        path = write_rows(tmp_path / "p.jsonl", rows)
        return f.load_prompts(config, path, tokenizer, set(range(16)), ["t"])
    a, b = read([{"prompt": "1+"}, {"problem": "2+", "answer": 0, "group": "g"}, {"prompt": "1" * 30}])
    assert (a.ids, b.ids, b.answer, b.group, b.teacher) == ([1, 10], [2, 10], "0", "g", "t")
    assert [p.answer for p in read([{"prompt": "1", "solution": "7"}, {"prompt": "1", "ground_truth": 0.5}])] == ["7", "0.5"]
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }},{% endfor %}{% if add_generation_prompt %}={% endif %}"
                               "{% if enable_thinking %}9{% endif %}{% if tools %}8{% endif %}")
    chat = [{"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}]
    ids = [p.ids for p in read([{"prompt": "1"}, {"messages": chat}, {"prompt": parts}, {"prompt": "3", "tools": [{"name": "x"}]}])]
    assert ids == [[1, 11, 12], [4, 11, 12], [4, 2, 11, 12], [3, 11, 12, 8]]
    config.enable_thinking = True
    assert read([{"prompt": "1"}])[0].ids == [1, 11, 12, 9]
    config.chat_template = "none"
    assert f.tokenize("1", tokenizer, config) == [1]
    with pytest.raises(f.UserError, match="line 1.*image"):
        config.chat_template = "auto"
        read([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}])

def test_a_byte_order_mark_is_no_text_and_special_tokens_are_not_doubled(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\n')
    assert f.load_prompts(f.Config(), str(tmp_path / "bom.jsonl"), f.tiny_tokenizer(), {1}, ["t"])[0].ids == [1]

    class Closing:  # a tokenizer that opens and closes every text
        chat_template, bos_token_id, eos_token_id, eos_token = None, 1, 2, "</s>"

        def __call__(self, text, verbose):
            return {"input_ids": [1, *([1] if text.startswith("<s>") else []), 5, *([2] if text.endswith("</s>") else []), 2]}
    assert f.tokenize("x", Closing(), f.Config()) == f.tokenize("<s>x", Closing(), f.Config()) == [1, 5]

def test_the_end_of_turn_of_the_chat_template_ends_a_response(pair):
    model, tokenizer, config = Qwen3ForCausalLM.from_pretrained(pair / "student"), f.tiny_tokenizer(), f.Config()
    ends = lambda: f.end_ids(model, tokenizer, config, set(range(16)))
    assert ends() == {14}
    for template in ("{{ m.content }}<pad>", "{{ m.content }}\n<pad>", "{{ m.content }} <pad>\n"):
        tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
        assert ends() == {13, 14}
    config.chat_template = "none"
    assert ends() == {14}

def test_an_id_that_only_the_student_knows_is_never_sampled_nor_graded(pair, tmp_path):
    run = loaded(pair, tmp_path / "out")
    policy = f.Policy(run.student.model, {14}, set(range(16)) - {3, 7}, run.config)
    uniforms = torch.from_numpy(np.random.default_rng(1).random((400, 3)))
    tokens, log_probs, _ = policy.sample([[1, 2]] * 400, uniforms)
    assert not torch.isin(tokens, torch.tensor([3, 7])).any()
    r = f.lay_out([f.Prompt([1, 2], None, "t", "")] * 400, {14}, tokens, log_probs, log_probs)
    scored, entropy = policy(r.ids, r.response)
    torch.testing.assert_close(scored, r.log_probs, rtol=1e-4, atol=1e-5)  # both over the shared ids alone
    scored.sum().backward()
    assert entropy.isfinite().all() and all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)

def test_positions_end_where_their_scaling_does():
    def limit(longest, **rope):
        c = Qwen3Config(max_position_embeddings=64, rope_parameters=dict(rope_theta=1e4, **rope))
        try:
            f.check_positions(f.Source("student", "folder", c, None), longest)
        except f.UserError:
            return False
        return True
    assert limit(64, rope_type="default") and not limit(65, rope_type="default")
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    assert limit(128, **yarn) and not limit(129, **yarn)
    long = dict(rope_type="longrope", short_factor=[1.0] * 64, long_factor=[8.0] * 64, original_max_position_embeddings=48)
    assert limit(48, **long) and not limit(49, **long)

def test_teachers_that_end_elsewhere_are_warned_about(pair, tmp_path, capsys):
    shutil.copytree(pair / "teacher", tmp_path / "t")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "t" / name
        path.write_text(path.read_text().replace('"eos_token_id": 14', '"eos_token_id": 3'))
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages }}")
    loaded(pair, tmp_path / "out", teacher=tmp_path / "t")
    out = capsys.readouterr().out
    assert "warning  end of sequence" in out and "warning  teacher has another chat template" in out

def test_a_model_that_caps_its_logits_fails_the_self_test(pair, tmp_path, monkeypatch, capsys):
    forward = Qwen3ForCausalLM.forward
    @functools.wraps(forward)
    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 2 * (out.logits / 2).tanh()
        return out
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", capped)
    with pytest.raises(SystemExit):
        f.main(flags(pair, tmp_path / "out"))
    assert "caps its logits" in capsys.readouterr().err
    monkeypatch.setattr(Qwen3Config, "logit_scale", 0.5, raising=False)  # and one that says so is not even tried
    with pytest.raises(SystemExit):
        f.main(flags(pair, tmp_path / "out2"))
    assert "its logit_scale is not supported" in capsys.readouterr().err

def other_model(kind):
    """Models that a plain transformer is not: with convolutions, with linear attention, with a bias in the head, with eyes."""
    torch.manual_seed(0)
    if kind == "convolutions":
        return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_multiple_of=8))
    if kind == "absolute positions":  # padding must not count in them
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=20, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, eos_token_id=14, bos_token_id=14))
    if kind == "linear attention":
        return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(
            **SMALL, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"]))
    if kind == "bias":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL | dict(num_key_value_heads=2)))
        torch.nn.init.normal_(model.lm_head.bias, std=2.0)
        return model
    text = SMALL | dict(head_dim=16, sliding_window=16)
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, mm_tokens_per_image=4, image_token_index=19, boi_token_index=18, eoi_token_index=17, vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8)))

@pytest.mark.parametrize("kind", ["convolutions", "linear attention", "absolute positions", "bias", "eyes"])
def test_models_of_other_kinds_are_at_no_distance_from_themselves(pair, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(f.Policy, "SEGMENT", 2)  # rows leave the batch and its cache, of whatever kind that is
    other_model(kind).save_pretrained(tmp_path / "model")
    f.tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = dict(teacher=tmp_path / "model", student=tmp_path / "model", max_new_tokens=16)
    f.main(flags(pair, tmp_path / "out", **settings, steps=1, lr=1e-12))
    row = log_of(tmp_path / "out")[0]
    assert abs(row["reverse_kl"]) < 1e-5 and row["skipped_updates"] == 0 and row["response_length"] < (16 if kind in ("convolutions", "linear attention") else 17)
    code, out = end(start(flags(pair, tmp_path / "out", **settings, steps=2, lr=1e-12, resume=True), tmp_path / "log", 2), tmp_path / "log")
    assert code == {0} and abs(log_of(tmp_path / "out")[1]["reverse_kl"]) < 1e-5, out
    if kind == "eyes":  # what text does not use is neither trained nor lost
        a, b = load_file(tmp_path / "model" / "model.safetensors"), weights_of(tmp_path / "out")
        assert a.keys() == b.keys() and any("vision" in name for name in a)

def test_models_that_cannot_be_supported_are_refused_in_words(pair, tmp_path, capsys):
    config = {key: value for key, value in SMALL.items() if key != "initializer_range"}
    for kind, prefix in (("Mamba", "no inner model or key/value cache"), ("RecurrentGemma", "sees padding")):
        torch.manual_seed(0)
        extra = {} if kind == "Mamba" else dict(block_types=["recurrent", "attention"])
        model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**config, **extra))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / kind)
        f.tiny_tokenizer().save_pretrained(tmp_path / kind)
        with pytest.raises(SystemExit):
            f.main(flags(pair, tmp_path / ("out" + kind), student=tmp_path / kind))
        error = capsys.readouterr().err
        assert prefix in error and error.count("\n") == 1

def test_what_is_wrong_with_a_checkpoint_is_named(pair, tmp_path, capsys):
    shutil.copytree(pair / "student", tmp_path / "s")
    weights = load_file(tmp_path / "s" / "model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, tmp_path / "s" / "model.safetensors", {"format": "pt"})
    (tmp_path / "s" / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 14}')
    tokens = tmp_path / "s" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"<unk>": 15', '"<unk>": 15, "Q": 20'))  # 20 rows: one token too many
    (tmp_path / "s" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n<pad>{% endfor %}{{ '1' }}")
    f.main(flags(pair, tmp_path / "out", student=tmp_path / "s"))
    out = capsys.readouterr().out
    assert "1 weights of its file have no place in the model, such as model.layers.0.self_attn.q_proj.bias" in out
    assert "its generation config is invalid" in out and "16 ids are sampled and graded: the student's other 1 have no embedding" in out
    # the export stops where training did: at its own end and at the template's end of turn
    assert GenerationConfig.from_pretrained(f.checkpoints(tmp_path / "out")[-1]).eos_token_id == [13, 14]
    # and a template that renders another date on another day does not end the run
    (tmp_path / "s" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n<pad>{% endfor %}{{ '2' }}")
    f.main(flags(pair, tmp_path / "out", student=tmp_path / "s", steps=4, resume=True))
    save_file({name: value * math.nan for name, value in weights.items()}, tmp_path / "s" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        f.main(flags(pair, tmp_path / "out2", student=tmp_path / "s"))
    assert "NaN in its weights?" in capsys.readouterr().err

# --- Memory -------------------------------------------------------------------------------------------------
def test_teachers_and_the_rollouts_cache_are_held_in_the_type_that_computes_and_draw_the_same_tokens(pair, tmp_path, monkeypatch):
    run, caches, drawn = loaded(pair, tmp_path / "out", dtype="bfloat16", max_new_tokens=30), [], []
    for kind in (f.RolloutCache, transformers.DynamicCache):
        monkeypatch.setattr(f, "RolloutCache", lambda kind=kind, **config: caches.append(kind(**config)) or caches[-1])
        drawn.append(run.student.sample([p.ids for p in run.prompts[:6]], f.uniforms(0, 9, rows=range(6), width=30)))
    assert all(torch.equal(a, b) for a, b in zip(*drawn))
    ours, theirs = (sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) for cache in caches)
    assert 2 * ours == theirs and caches[0].layers[0].keys.dtype == torch.bfloat16
    assert {p.dtype for p in run.teachers["teacher"].parameters()} == {torch.bfloat16}  # the folder is float32
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    longest = caches[0].get_seq_length() + 1  # the last token never enters
    assert ours == f.report_memory(run, longest)["rollout"] * (longest - 1) / longest

@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_report_knows_what_a_real_layer_keeps_for_backward(dtype):
    shape = dict(vocab_size=64, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    model, kept = Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=2)), {}  # two layers of Qwen3-0.6B
    run = SimpleNamespace(config=f.Config(dtype=dtype, micro_batch_tokens=1), student=SimpleNamespace(model=model), teachers={}, eval_prompts=[])

    def measured(n):
        kept.clear()
        pack = lambda x: kept.update({x.untyped_storage().data_ptr(): (x.untyped_storage().nbytes(), x)}) or x
        with torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.model(input_ids=torch.zeros(1, n, dtype=torch.long), use_cache=False)
        return sum(size for size, _ in kept.values())
    reported = [f.report_memory(run, n)["update"] for n in (32, 64)]
    assert reported[1] - reported[0] == pytest.approx(measured(64) - measured(32), rel=0.2)

# --- Bad input: one line, status 2, no traceback ------------------------------------------------------------
def bad_inputs(pair, root):
    """(name, argv, what the line must contain), at least sixty."""
    out = itertools.count()
    new = lambda: root / f"out{next(out)}"

    def run(**settings):
        return flags(pair, new(), **settings)

    def file(content):
        path = root / f"file{next(out)}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)
    prompts, config = lambda content: run(prompts=file(content)), lambda content: ["--config", file(content), *run()]

    def student(change, **settings):
        folder = root / f"student{next(out)}"
        shutil.copytree(pair / "student", folder)
        change(folder)
        return run(student=folder, **settings)

    def vocabulary(change):
        def edit(folder):
            path = folder / "tokenizer.json"
            path.write_text(change(path.read_text()))
        return edit
    cut = lambda name, keep=0.5: lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:int(keep * (folder / name).stat().st_size)])
    template = lambda text: lambda folder: (folder / "chat_template.jinja").write_text(text)
    good = '{"prompt": "1+2="}\n'
    busy = root / "busy"
    busy.mkdir()
    (busy / "config.json").write_text('{"steps": 7}')
    (busy / "metrics.jsonl").write_text("")
    (root / "saved" / "checkpoint-000001").mkdir(parents=True)

    def tiny(**changes):
        task = dict(models={"student": "+", "a": "+"}, mixture={"+": 1.0}, graded_by={"+": "a"}, student_loss=9.0)
        base = dict(digits=3, pretrain_lr=1e-3, pretrain_steps=1, teacher_loss=9.0, tasks={"foreign": task | changes},
                    **{k: dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2) for k in ("teacher", "student")})
        return ["--output-dir", new(), "--config", config(json.dumps({"tiny": base}))[1]]
    (root / "afile").write_text("x")
    (root / "empty").mkdir()

    def pickled(folder):
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def renamed(folder):
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    yield from [
        ("unknown flag", run() + ["--stpes", "3"], "--steps"), ("stray word", run() + ["hello"], "hello"),
        ("no value", run() + ["--lr"], "--lr"), ("only teacher", ["--teacher", "x"], "--student, --prompts"),
        ("only prompts", ["--prompts", "x", "--student", "y"], "--teacher"), ("text for a number", run(steps="many"), "steps"),
        ("fraction of a step", run(steps="1.5"), "steps"), ("negative steps", run(steps=-1), "[0, 999999]"),
        ("percentile over 100", run(filter_percentile=101), "[0, 100]"), ("percentile below 0", run(filter_percentile=-1), "[0, 100]"),
        ("lr of zero", run(lr=0), "lr must be in"), ("lr nan", run(lr="nan"), "lr"), ("lr infinite", run(lr="inf"), "lr"),
        ("temperature 0", run(temperature=0), "temperature must be in"), ("alpha negative", run(alpha=-0.1), "alpha must be in"),
        ("batch of zero", run(batch_size=0), "[1, 1000000]"), ("huge number", run(steps="9" * 5000), "steps"),
        ("unknown choice", run(loss_agg="sum"), "seq-mean"), ("indivisible batch", run(batch_size=6, rollouts_per_prompt=4), "multiple"),
        ("resume without folder", ["--resume"], "--output-dir"), ("resume nothing", run(resume=True), "no complete checkpoint"),
        ("tiny and models of one's own", ["--config", os.path.join(HERE, "tiny_config.json"), *run()], "brings its own"),
        ("tiny and prompts of one's own", ["--eval-prompts", pair / "prompts.jsonl"], "go together"),
        ("config help", config('{"help": true}'), "help"), ("no such task", ["--task", "lunar", "--output-dir", new()], "lunar"),
        ("config missing", run(config=root / "nowhere.json"), "nowhere.json"), ("config is a folder", run(config=root), "config"),
        ("config not JSON", config("{steps: 3}"), "JSON"), ("config a list", config("[1]"), "object"), ("config empty", config(""), "JSON"),
        ("config binary", config(b"\xff\xfe\x00"), "config"), ("config unknown key", config('{"btach_size": 3}'), "--batch-size"),
        ("config wrong type", config('{"steps": "3x"}')[:2], "steps"), ("config bool for int", config('{"steps": true}')[:2], "steps"),
        ("config NaN", config('{"alpha": NaN}'), "alpha"),
        ("config null", ["--config", config('{"output_dir": null}')[1]], "output_dir must be"),
        ("config list value", config('{"alpha": [1]}'), "alpha"),
        ("config bad tiny", ["--config", config('{"tiny": {"tasks": 3}}')[1], "--output-dir", new()], "tiny"),
        ("prompts missing", run(prompts=root / "none.jsonl"), "none.jsonl"),
        ("prompts a folder", run(prompts=root), "prompts" if False else str(root)), ("prompts empty", prompts(""), "0 prompts"),
        ("prompts blank", prompts("\n \n"), "0 prompts"), ("prompts binary", prompts(b"\x89PNG\r\n\x1a\n" + bytes(range(256))), "line 1"),
        ("prompts not JSON", prompts(good + "nope\n"), "line 2"), ("prompts truncated", prompts(good + '{"prompt": "1'), "line 2"),
        ("prompts a list", prompts("[1]\n"), "line 1"), ("prompts a number", prompts(good * 2 + "3\n"), "line 3"),
        ("prompt missing", prompts('{"text": "1"}\n'), "line 1"), ("prompt empty", prompts('{"prompt": ""}\n'), "line 1"),
        ("prompt a number", prompts('{"prompt": 3}\n'), "line 1"), ("prompt null", prompts('{"prompt": null}\n'), "line 1"),
        ("messages without template", prompts('{"prompt": [{"role": "user", "content": "1"}]}'), "chat template"),
        ("prompt without tokens", student(template("{{ '' }}")), "no tokens"),
        ("template raises", student(template("{{ raise_exception('no') }}")), "line 1"),
        ("template broken", student(template("{% if %}")), "line 1"),
        ("messages malformed", student(template("{{ messages[0].content }}")) + ["--prompts", prompts('{"prompt": [3]}')[5]], "line 1"),
        ("answer a list", prompts('{"prompt": "1", "answer": ["a"]}\n'), "answer"),
        ("teacher unknown", prompts(good + '{"prompt": "1", "teacher": "bob"}\n'), "bob"),
        ("invalid UTF-8", prompts(b'{"prompt": "\xc3\x28"}\n'), "line 1"), ("lone surrogate", prompts('{"prompt": "\\ud800"}\n'), "surrogates"),
        ("huge line", prompts('{"prompt": "' + "1" * 10 ** 6 + '"}\n'), "max-prompt-tokens"), ("deep JSON", prompts("[" * 10 ** 5), "line 1"),
        ("all prompts too long", run(max_prompt_tokens=2), "40 prompts"),
        ("eval prompts missing", run(eval_prompts=root / "no.jsonl"), "no.jsonl"),
        ("student missing", run(student=root / "nowhere"), "no such folder"), ("student a file", run(student=root / "afile"), "no such folder"),
        ("a hub name without network", run(student="fire-opd/does-not-exist"), "no such folder"), ("student empty", run(student=root / "empty"), "tokenizer"), ("teacher missing", run(teacher="./nowhere"), "teacher"),
        ("teacher twice", run(teacher=[f"a={pair / 'teacher'}", f"a={pair / 'other'}"]), "NAME=PATH"),
        ("teacher without path", run(teacher="a="), "no such folder"),
        ("rows name no teacher", run(teacher=[f"a={pair / 'teacher'}", f"b={pair / 'other'}"]), "line 1"),
        ("beyond the positions", student(lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"max_position_embeddings": 32768', '"max_position_embeddings": 16'))), "positions end at 16"),
        ("weights truncated", student(cut("model.safetensors")), "safetensors"),
        ("weights empty", student(cut("model.safetensors", 0)), "safetensors"),
        ("weights missing", student(lambda d: (d / "model.safetensors").unlink()), "safetensors"),
        ("weights of nothing", student(renamed), "missing"), ("weights pickled", student(pickled), "safetensors"),
        ("config.json cut", student(cut("config.json")), "student"), ("tokenizer cut", student(cut("tokenizer.json")), "tokenizer"),
        ("vocabulary swapped", student(vocabulary(lambda t: t.replace('"3": 3', '"3": 4').replace('"4": 4', '"4": 3', 1))), "2 of the student's"),
        ("vocabulary disjoint", student(vocabulary(lambda t: re.sub(r'"(\d)": (\d)', r'"x\1": \2', t))), "10 of the student's"),
        ("prompt beyond the teacher's vocabulary", student(vocabulary(lambda t: t.replace('"<unk>": 15', '"<unk>": 15, "Q": 16'))) + ["--prompts", prompts('{"prompt": "1Q"}')[5]], "'Q'"),
        ("weights of another shape", student(lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64'))), "shape"),
        ("output a file", run(output_dir=root / "afile"), "output folder"),
        ("output under a file", run(output_dir=root / "afile" / "x"), "output folder"),
        ("output with checkpoints", run(output_dir=root / "saved"), "--resume"),
        ("output not UTF-8", run(output_dir=str(root) + "/\udcff"), "output folder"), ("tiny without mixture", tiny(mixture=None), "tiny"),
        ("tiny shares do not add up", tiny(mixture={"+": 0.5}), "tiny"), ("steps beyond all folders", run(steps=10 ** 6), "[0, 999999]"),
        ("batch beyond memory", run(batch_size=10 ** 10), "[1, 1000000]"), ("seed too large", run(seed=2 ** 64), "seed"),
        ("adapter", student(lambda d: (d / "adapter_config.json").write_text("{}")), "LoRA"),
        ("output in use", run(output_dir=busy), "other settings"), ("output unwritable", run(output_dir="/proc/nowhere"), "output folder"),
    ]

def test_bad_input_gives_one_line_and_status_2(pair, tmp_path, capsys):
    tried = 0
    for name, argv, needle in bad_inputs(pair, tmp_path):
        capsys.readouterr()
        try:
            f.main(list(map(str, argv)))
        except SystemExit as stop:
            assert stop.code == 2, name
        else:
            raise AssertionError(f"{name}: no error")
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, (name, error)
        assert needle in error, (name, needle, error)
        tried += 1
    assert tried >= 60 and (tmp_path / "busy" / "metrics.jsonl").exists()

def test_a_real_process_ends_with_one_line_and_status_2(pair, tmp_path):
    done = subprocess.run([sys.executable, FILE, *flags(pair, tmp_path / "out", student=tmp_path / "no")], text=True,
                          capture_output=True, env=CPU)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "" and not (tmp_path / "out").exists()

# --- Checkpoints --------------------------------------------------------------------------------------------
def test_the_saved_student_loads_and_generates(pair, tmp_path):
    from transformers import pipeline
    for tie in (True, False):
        save_model(tmp_path / f"s{tie}", 5, tie_word_embeddings=tie)
        out = tmp_path / f"out{tie}"
        f.main(flags(pair, out, student=tmp_path / f"s{tie}"))
        text = pipeline("text-generation", f.checkpoints(out)[-1])("12+=", min_new_tokens=5, max_new_tokens=5)[0]["generated_text"]
        assert text.startswith("12+=") and len(text) > 4
        assert ("lm_head.weight" in weights_of(out)) is not tie

@pytest.mark.parametrize("settings", [dict(), dict(rollouts_per_prompt=2)])
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(pair, tmp_path, settings, capsys):
    settings |= dict(eval_prompts=pair / "prompts.jsonl", eval_every=2, save_every=1, keep=9)
    f.main(flags(pair, tmp_path / "whole", steps=5, **settings))
    f.main(flags(pair, tmp_path / "cut", steps=2, **settings))
    lines = open(tmp_path / "cut" / "metrics.jsonl").readlines()[:-1]  # a kill before the evaluation of step 2
    with open(tmp_path / "cut" / "metrics.jsonl", "w") as file:  # or in step 4 would leave this
        file.writelines([*lines, '{"step": 3, "loss": 1}\n{"step": 4, "lo'])
    assert not any(f.main(flags(pair, tmp_path / "cut", steps=5, resume=True, **settings)) for _ in range(2))  # then no more
    same_metrics(log_of(tmp_path / "whole"), log_of(tmp_path / "cut"), rel=0, abs=0)
    whole, cut = moments_of(tmp_path / "whole"), moments_of(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[n][k], cut[n][k]) for n in whole for k in whole[n])
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)
    with pytest.raises(SystemExit):
        f.main(flags(pair, tmp_path / "cut", steps=6, resume=True, **settings | dict(lr=0.5)))
    error = capsys.readouterr().err
    assert "lr was 0.01, is 0.5" in error and "steps" in error

def test_a_run_stopped_before_its_first_step_resumes_to_the_same_bits(pair, tmp_path, monkeypatch):
    f.main(flags(pair, tmp_path / "whole"))
    load = f.load
    monkeypatch.setattr(f, "load", lambda *a: f.STOP.set() or load(*a))
    with pytest.raises(SystemExit) as stop:
        f.main(flags(pair, tmp_path / "cut"))
    assert stop.value.code == 130 and f.checkpoints(tmp_path / "cut")[0].name == "checkpoint-000000"
    monkeypatch.undo()
    f.main(flags(pair, tmp_path / "cut", resume=True))
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)

def test_a_run_that_died_before_its_first_checkpoint_starts_again_and_ours_are_the_tracebacks(pair, tmp_path, monkeypatch, capsys):
    score = f.score
    monkeypatch.setattr(f, "score", lambda *a: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        f.main(flags(pair, tmp_path / "out"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" in error and "ZeroDivisionError" in error
    monkeypatch.undo()
    f.main(flags(pair, tmp_path / "out"))
    assert [row["step"] for row in log_of(tmp_path / "out")] == [1, 2, 3]

def test_resume_refuses_a_broken_checkpoint(pair, tmp_path, capsys):
    argv = flags(pair, tmp_path / "out", save_every=1, keep=9)
    f.main(argv)
    path = os.path.join(f.checkpoints(tmp_path / "out")[-1], "optimizer.pt")
    intact = open(path, "rb").read()
    for damage in (intact[:100], b"", b"x" * 1000):
        open(path, "wb").write(damage)
        with pytest.raises(SystemExit) as stop:
            f.main(argv + ["--resume"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "before it" in error

def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_alone(pair, tmp_path, capsys, monkeypatch):
    save = torch.save

    def full(tensors, path):
        if f.checkpoints(tmp_path / "out"):
            raise OSError(28, "No space left on device")
        save(tensors, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        f.main(flags(pair, tmp_path / "out", save_every=1))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "No space left" in error
    monkeypatch.undo()
    f.main(flags(pair, tmp_path / "out", save_every=1, resume=True))
    assert [os.path.basename(c) for c in f.checkpoints(tmp_path / "out")] == ["checkpoint-000002", "checkpoint-000003"]

def child(argv, log, rank, ranks, port):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    f.RANK, f.WORLD_SIZE = rank, ranks
    f.main(argv)

def start(argv, log, ranks=1):
    """Runs as processes of their own: forks, since importing torch again would take longer than most runs here."""
    fork, port = multiprocessing.get_context("fork"), socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    processes = [fork.Process(target=child, args=(argv, log, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes

def end(processes, log):
    for process in processes:
        process.join(120) or process.kill()  # nothing, if it has ended
    return {process.exitcode for process in processes}, open(log).read()

def test_a_signal_and_a_kill_lose_nothing(pair, tmp_path):
    settings = dict(steps=60, save_every=3, batch_size=4, max_new_tokens=6)
    f.main(flags(pair, tmp_path / "whole", **settings))
    argv, log, deadline = flags(pair, tmp_path / "cut", **settings), tmp_path / "log", time.time() + 60
    run = start(argv, log)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while (not metrics.exists() or len(open(metrics).readlines()) < 4) and time.time() < deadline:
        time.sleep(0.002)
    assert [(run[0].terminate(), time.sleep(0.02)) for _ in range(3)]  # launchers send it more than once
    code, out = end(run, log)
    assert code == {130} and "go on " in out and "error" not in out
    first = f.checkpoints(tmp_path / "cut")[-1]
    run = start(argv + ["--resume"], log)
    while f.checkpoints(tmp_path / "cut")[-1] == first and time.time() < deadline:
        time.sleep(0.002)
    run[0].kill()
    assert end(run, log)[0] == {-signal.SIGKILL}
    f.main(argv + ["--resume"])
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(whole[n], cut[n]) for n in whole)
    same_metrics(log_of(tmp_path / "whole"), log_of(tmp_path / "cut"), rel=0, abs=0)

# --- Ranks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks,settings", [
    (2, dict(batch_size=12, max_new_tokens=12)),
    (3, dict(batch_size=6, filter_percentile=90)),  # one trajectory kept: two ranks have nothing to train on
    (3, dict(batch_size=12, micro_batch_tokens=30)),  # thirds are not exact: the order of sums shows in the bits
    (2, dict(batch_size=12, shard=True, gradient_checkpointing=True, micro_batch_tokens=40, max_new_tokens=70,
             rollout_batch_size=4))])  # responses longer than a segment, and 2 against 1 batches in the evaluation
def test_two_and_three_ranks_are_the_same_run(pair, tmp_path, ranks, settings):
    settings |= dict(teacher=[f"one={pair / 'teacher'}", f"two={pair / 'other'}"], prompts=pair / "routed.jsonl",
                     eval_prompts=pair / "routed.jsonl", steps=3, save_every=2,
                     lr=1e-3)  # of a first gradient that is all rounding (2e-8, with an epsilon of 1e-8) AdamW makes up to lr
    f.main(flags(pair, tmp_path / "one", **settings))
    code, out = end(start(flags(pair, tmp_path / "many", **settings), tmp_path / "log", ranks), tmp_path / "log")
    assert code == {0}, out
    assert out.count("step 3: evaluation") == 1  # rank 0 alone prints
    same_metrics(log_of(tmp_path / "one"), log_of(tmp_path / "many"), rel=1e-3, abs=1e-4)
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert one.keys() == many.keys()
    moments = [moments_of(tmp_path / run) for run in ("one", "many")]
    for name in one:
        a, b = (state["model." + name] for state in moments)
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one[name], many[name], rtol=1e-3, atol=1e-4)
    # a resumed run on the same ranks is the same run; and what many ranks have saved, one rank can resume
    shutil.copytree(tmp_path / "many", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000003")
    argv = flags(pair, tmp_path / "cut", **settings, resume=True)
    code, out = end(start(argv, tmp_path / "log2", ranks), tmp_path / "log2")
    assert code == {0}, out
    cut = weights_of(tmp_path / "cut")
    assert all(torch.equal(many[name], cut[name]) for name in many)
    f.main(flags(pair, tmp_path / "many", **settings | dict(steps=4, resume=True)))
    assert f.checkpoints(tmp_path / "many")[-1].name == "checkpoint-000004"

def test_a_sharded_student_in_bf16_keeps_its_uniforms_in_float64(pair, tmp_path):
    argv = flags(pair, tmp_path / "out", steps=1, shard=True, dtype="bfloat16")
    code, out = end(start(argv, tmp_path / "log", 2), tmp_path / "log")
    assert code == {0} and math.isfinite(log_of(tmp_path / "out")[0]["loss"]), out

def test_an_error_under_torchrun_ends_all_ranks_with_one_line(pair, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29400 + os.getpid() % 5000), FILE,
         *flags(pair, tmp_path / "out", batch_size=5)], capture_output=True, text=True, timeout=60, env=CPU)
    assert done.returncode == 1 and "multiple of rollouts_per_prompt" in done.stderr and "Root Cause" in done.stderr
    assert done.stderr.count("error: batch_size") == 1

# --- The README ---------------------------------------------------------------------------------------------
def readme():
    return open(os.path.join(HERE, "README.md"), encoding="utf-8").read()

def test_the_readmes_functions_and_flags_are_those_of_the_file():
    text = readme()
    equations = re.findall(r"^\|[^|\n]*\|[^\n]*\|\s*`(\w+)`\s*\|$", text.split("## The idea")[1].split("\n## ")[0], re.M)
    assert len(equations) == 8 and all(callable(getattr(f, name)) for name in equations)
    others = {"nproc-per-node", "nnodes", "standalone", "master-port", "rdzv-backend", "rdzv-endpoint", "max-restarts", "tasks", "model",
              "shutdown-timeout", "help", "model-args"}  # of other programs
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", text)):
        assert flag.replace("_", "-") in others or flag.removeprefix("no-").replace("-", "_") in f.SETTINGS, flag

def test_the_readmes_shell_blocks_run_as_printed(tmp_path):
    """Those under the comment <!-- runnable -->, in an empty folder: the README's first claim is checked here."""
    text = readme()
    blocks = re.findall(r"<!-- runnable -->\n```bash\n(.*?)```", text, re.S)
    for name in ("fire_opd.py", "tiny_config.json"):
        shutil.copy(os.path.join(HERE, name), tmp_path)
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    port = str(29100 + os.getpid() % 5000)
    script = "".join(blocks).replace("--alpha 0 --beta 0\n", "--alpha 0 --beta 0 &\n") + "wait\n"  # beside the others
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env=CPU | {"PATH": path, "PET_MASTER_PORT": port})
    assert done.returncode == 0, done.stderr
    assert "DROPPED" in done.stdout and "first        last" in done.stdout and "nan" not in done.stdout
    first, fire, opd = (log_of(tmp_path / "runs" / run)[i] for run, i in (("tiny", 0), ("tiny", 51), ("opd", -1)))
    assert first["step"] == 0 and fire["step"] == opd["step"] == 50 and len(blocks) >= 3
    glossary = text.split("## Metrics")[1].split("\n## ")[0]
    for row in log_of(tmp_path / "runs" / "tiny"):
        for name in row.keys() - {"step"}:
            assert f"`{re.sub('^eval/|_(kept|dropped)$|/[+,]$', '', name)}`" in glossary, name
    assert fire["eval/reverse_kl/+"] < 0.8 * first["eval/reverse_kl/+"]  # it learns what its teacher knows
    assert fire["eval/exact_match/+"] > first["eval/exact_match/+"] + 0.05
    assert fire["eval/exact_match/,"] > 0.6 > 0.1 > opd["eval/exact_match/,"]  # and keeps what it does not, unlike OPD

def test_the_readmes_comparison_runs_as_printed(tmp_path, monkeypatch):  # in miniature, the commands in this process
    loop, table = (re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", readme(), re.S)[1] for name in ("comparison", "table"))
    config = json.load(open(os.path.join(HERE, "tiny_config.json"))) | dict(steps=2, batch_size=8)
    config["tiny"] |= dict(pretrain_steps=2)
    (tmp_path / "tiny_config.json").write_text(json.dumps(config))
    (tmp_path / "table.py").write_text(table)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> commands\nmkdir -p "$5"\n')  # $5 follows --output-dir
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["bash", "-euo", "pipefail", "-c", loop], check=True, env=CPU | {
        "SEEDS": "0", "TASK": "--config tiny_config.json", "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    commands = [line.split() for line in open("commands")]
    shutil.rmtree("runs")
    assert [command.pop(0) for command in commands] == ["fire_opd.py"] * 8
    for command in commands:
        f.main(command)
        open(os.path.join(command[command.index("--output-dir") + 1], "done"), "w").close()
    done = subprocess.run([sys.executable, "table.py", "runs/compare"], capture_output=True, text=True)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 8 and "FiRe-OPD" in rows and "+0.000" in done.stdout, done.stderr

def test_the_exercises_of_the_readme_hold(monkeypatch):
    blocks = re.findall(r"```python\n(import torch, fire_opd.*?)```", readme(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        for name in ("token_weights", "trajectory_scores", "policy_loss"):
            monkeypatch.setattr(f, name, getattr(f, name))  # restores it afterwards
        exec(block, {})
        monkeypatch.undo()

# --- A GPU: these skip themselves where there is none; all others run on the CPU ------------------------------
@pytest.fixture
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(f, "DEVICE", "cuda")
    torch.cuda.reset_peak_memory_stats()

def test_on_a_gpu_a_step_in_float32_is_the_cpus_and_in_bf16_close_to_it(gpu, pair, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(f, "DEVICE", "cpu")
        run = loaded(pair, tmp_path / "cpu", batch_size=32, max_grad_norm=1e9)
        expected = scored_step(run)
        grads, _ = gradient(run, expected)
    for dtype, share, tolerance in (("float32", 0.9, 1e-3), ("bfloat16", 0.5, 0.1)):
        run = loaded(pair, tmp_path / dtype, batch_size=32, max_grad_norm=1e9, dtype=dtype)
        ours, rollouts = responses_of(expected), responses_of(scored_step(run))
        assert sum(a == b for a, b in zip(ours, rollouts)) >= share * 32  # a rounding may flip a token
        again = copy.deepcopy(expected)
        f.score(run, again)
        torch.testing.assert_close(again.scores, expected.scores, rtol=tolerance, atol=tolerance)
        for name, grad in gradient(run, expected)[0].items():
            assert (grad.cpu() - grads[name]).norm() <= tolerance * grads[name].norm() + 1e-5, name

def test_on_a_gpu_a_run_saves_and_resumes(gpu, pair, tmp_path):
    argv = flags(pair, tmp_path / "out", dtype="bfloat16", save_every=1)
    f.main(argv)
    f.main(argv + ["--steps", "5", "--resume"])
    rows = log_of(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all(row["skipped_updates"] == 0 for row in rows)

def test_on_a_gpu_the_peak_is_what_the_report_says(gpu, pair, tmp_path):
    save_model(tmp_path / "large", 3, 1024, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    run = loaded(pair, tmp_path / "out", student=tmp_path / "large", dtype="bfloat16", batch_size=256, max_new_tokens=120, micro_batch_tokens=16384)
    terms = f.report_memory(run, 130)
    f.train_step(run)
    assert torch.cuda.max_memory_allocated() == pytest.approx(sum(terms.values()) - min(terms["rollout"], terms["update"]), rel=0.2)

def test_on_two_gpus_ranks_agree_over_nccl(gpu, pair, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    argv = flags(pair, tmp_path / "one", batch_size=12)
    f.main(argv)
    argv[argv.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", FILE, *argv], check=True)
    same_metrics(log_of(tmp_path / "one")[:1], log_of(tmp_path / "two")[:1], rel=1e-2, abs=1e-2)
