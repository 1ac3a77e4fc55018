"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): on-policy distillation of LLMs in one file.

The student writes, the teacher grades every token that the student wrote, the student moves towards the
teacher. FiRe-OPD adds two selections to this: it drops the trajectories that the teacher finds least likely
(Filter) and weighs the tokens of the others by how sure the teacher and how unsure the student is (Reweight).
One step, and where to read it (pi_S: student, pi_T: teacher, H: entropy; max and mean over a rollout y):

  1. rollout    y ~ pi_S(.|x), exactly softmax(logits / temperature), and its H_S,t        rollout
  2. score      log pi_T(y_t) and H_T,t, the logits in chunks of tokens                    score
  3. filter     s = mean_t log pi_T(y_t); keep s >= the 20 % quantile of the whole step    filter_trajectories
  4. reweight   w_t = (1 + alpha (1 - H_T,t/max H_T)) (1 + beta H_S,t/max H_S), mean 1     token_weights
  5. loss       policy gradient of w_t A_t with the advantage A_t = log(pi_T / pi_S)       policy_loss
  6. update     one AdamW step from the kept tokens of all micro-batches and ranks         update

`train_step` puts these together and `train` is the loop around it. There the method ends, and a line says so;
what follows serves it. `config.x` is the setting --x, of the dataclass `Config`.

    python fire_opd.py                                           # a tiny pair, no download, under a minute
    python fire_opd.py --teacher T --student S --prompts P.jsonl                     # real models, one GPU
    torchrun --nproc-per-node 8 fire_opd.py --teacher T --student S --prompts P.jsonl          # eight GPUs

The pure functions of the method come first and need nothing else of the file: `import fire_opd`, test them.
Left out on purpose: a critic, a reward, a reference model and its KL penalty, several updates a rollout,
top-k or full-vocabulary divergences, an inference server, learning-rate schedules, logging services.
"""

import argparse, collections, dataclasses, datetime, difflib, functools, inspect, json, os, re, shutil, signal
import sys, threading, time, traceback, warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, nan
from pathlib import Path

import huggingface_hub, tokenizers, torch
import numpy as np
from numpy.random import default_rng
from torch import Tensor, distributed as dist, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

# --- The method: pure tensor functions, no models, no globals -----------------------------------------------
def upcast(x):
    """bfloat16 and float16 become float32, float32 and float64 stay: no softmax is taken in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def is_eos(tokens, eos_ids):
    """Which tokens end a response; several ids may. tokens [...], eos_ids: ints -> [...] bool."""
    return torch.isin(tokens, tokens.new_tensor(sorted(eos_ids)))

def response_mask(tokens, eos_ids):
    """True up to and including the first end of sequence. tokens [B, T], eos_ids: ints -> [B, T] bool.

    By position: with pad == eos a comparison with the pad id would lose the EOS that teaches to stop."""
    ends = is_eos(tokens, eos_ids).long()
    return ends.cumsum(1) - ends == 0  # no EOS strictly before this token

def trajectory_scores(teacher_log_probs, response_mask):
    """s = (1/|y|) sum_t log pi_T(y_t): how likely the teacher finds each trajectory, per token.

    teacher_log_probs, response_mask [B, T] -> scores [B] in nats per token. A row without a response scores
    minus infinity: an empty mean of 0 would be the best score there is."""
    mask = response_mask.bool()
    lengths = mask.sum(1)  # [B]
    total = upcast(teacher_log_probs).masked_fill(~mask, 0).sum(1)  # [B]
    return torch.where(lengths > 0, total / lengths.clamp(min=1), -torch.inf)

def filter_trajectories(scores, percentile):
    """Filter: keep the trajectories with s >= the `percentile` quantile of all finite scores.

    scores [B] of the WHOLE step: a micro-batch of one row has that row as its quantile, and drops nothing.
    percentile in [0, 100], else ValueError -> keep [B] bool. Linear interpolation; ties with the quantile
    stay, 0 keeps every finite score, NaN and infinite scores are never kept."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percentile}")
    finite = scores.isfinite()
    if not finite.any():
        return finite
    ordered = scores[finite].double().sort().values  # [n]
    position = round(percentile * (len(ordered) - 1) / 100, 9)  # else 16.1 % of 1000 is 161.00000000000003
    low, high = ordered[floor(position)], ordered[ceil(position)]
    return finite & (scores.double() >= low + position % 1 * (high - low))

def token_weights(teacher_entropy, student_entropy, response_mask, alpha=1.0, beta=1.0, scope="trajectory"):
    """Reweight: w_t = (1 + alpha c_t) (1 + beta u_t), divided by its mean over the scope's valid tokens.

    Teacher confidence c_t = clamp(1 - H_T,t / max_t H_T, 0, 1): a teacher that hesitates teaches little.
    Student confusion  u_t = clamp(H_S,t / max_t H_S, 0, 1): where the student hesitates it has most to learn.
    Entropies in nats and response_mask, all [B, T] -> weights [B, T], zero off the mask, without gradient.
    scope: max and mean of each "trajectory" or of the "batch" (the mask tells the rows), else ValueError."""
    if scope not in ("trajectory", "batch"):
        raise ValueError(f"scope must be 'trajectory' or 'batch', got {scope!r}")
    dims = 1 if scope == "trajectory" else (0, 1)
    mask = response_mask.bool()

    def relative(entropy):  # H / max H in [0, 1]; 0 / 0 is 0
        entropy = upcast(entropy.detach()).masked_fill(~mask, 0)
        largest = entropy.amax(dims, keepdim=True).clamp(min=torch.finfo(entropy.dtype).tiny)
        return (entropy / largest).clamp(0, 1)

    confidence, confusion = 1 - relative(teacher_entropy), relative(student_entropy)  # [B, T]
    weights = ((1 + alpha * confidence) * (1 + beta * confusion)).masked_fill(~mask, 0)
    # Mean 1 keeps the step size of plain distillation: the weights only move it from token to token.
    return weights * mask.sum(dims, keepdim=True) / weights.sum(dims, keepdim=True).clamp(min=1e-12)

def policy_loss(log_probs, old_log_probs, teacher_log_probs, weights, mask, num_tokens, clip_ratio=0.2):
    """-(1/num_tokens) sum over mask of min(r_t w_t A_t, clip(r_t, 1-eps, 1+eps) w_t A_t) -> scalar.

    A_t = log pi_T(y_t) - log pi_S_old(y_t), detached: the k1 estimate of minus the reverse KL(pi_S || pi_T)
    at this token. r_t = pi_S / pi_S_old is 1 in value, but not in gradient, where old_log_probs are this very
    pass's, as in `update`: then the loss is plain REINFORCE and the clip never acts. All tensors [B, T], in
    nats. num_tokens counts the kept tokens of the whole step, over all micro-batches and ranks, because their
    gradients ADD: divided by its own count, a short micro-batch would weigh its tokens more."""
    mask = mask.bool()

    def valid(x):  # masked before exp(): an infinity off the mask would make the gradient 0 * inf = NaN
        return upcast(x).masked_fill(~mask, 0)

    advantages = valid((teacher_log_probs - old_log_probs).detach())  # [B, T]
    weighted = valid(weights.detach()) * advantages  # [B, T]
    ratio = (valid(log_probs) - valid(old_log_probs.detach())).exp()  # [B, T]
    objective = torch.minimum(ratio * weighted, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * weighted)
    return -objective.sum() / num_tokens

def token_log_probs_and_entropy(hidden, lm_head_weight, targets, temperature=1.0, chunk=128, bias=None,
                                with_entropy=True):
    """log pi(target_n) and H_n of pi = softmax((hidden W^T + bias) / temperature), never whole over [N, V].

    hidden [N, D], lm_head_weight [V, D], targets [N], bias [V] or None -> log_probs [N] (differentiable) and
    entropy [N] (not; 0 if not wanted), in nats. At 152 k entries the logits of 8,192 tokens are 5 GB, several
    times over with their gradient. Here only one chunk has logits at a time; backward computes them again."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def one_chunk(h, y):  # [chunk, D], [chunk]
        # W is cast in each chunk anew: so the chunks' gradients of the student's W add up in its float32.
        logits = upcast((h / temperature).to(dtype) @ lm_head_weight.to(dtype).T)  # [chunk, V]
        log_p = (logits if bias is None else logits + bias / temperature).log_softmax(1)
        log_probs = log_p.gather(1, y[:, None])[:, 0]  # backward computes again up to here
        log_p = log_p.detach()  # nansum: 0 log 0 is 0
        return log_probs, -log_p.exp().mul_(log_p).nansum(1) if with_entropy else torch.zeros_like(log_probs)

    parts = [checkpoint(one_chunk, h, y, use_reentrant=False, preserve_rng_state=False)
             for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    log_probs, entropy = zip(*parts)
    return torch.cat(log_probs), torch.cat(entropy)

def sample_tokens(logits, uniforms, temperature=1.0):
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u is a draw from pi.

    logits [B, V], uniforms [B] in [0, 1) -> tokens, log_probs, entropy, all [B]. Given u the sampler is a
    function: no generator state to save or share. The sum is in float64 and u is scaled by its end: in
    float32 a sum over 152 k entries ends short of 1, and a u beyond it would be no token at all. NaN logits
    give the last token and a NaN log-prob, for `update` to find."""
    probs = (upcast(logits) / temperature).softmax(1)
    cdf = probs.cumsum(1, dtype=torch.float64)  # [B, V]
    points = uniforms.double() * cdf[:, -1]  # below the end, as u is below 1
    tokens = torch.searchsorted(cdf, points[:, None], right=True)  # [B, 1]; right: skips probability 0
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log(), -(probs * probs.log()).nansum(1)

# --- Settings: a line a flag; parsing and checks stand at the end -------------------------------------------
def setting(default, text, low=None, high=10**9, choices=None):  # low and high are inclusive
    return field(default=default, metadata=dict(text=text, low=low, high=high, choices=choices))

@dataclass
class Config:
    filter_percentile: float = setting(20.0, "the filter's quantile of the trajectory scores, in %", 0, 100)
    filter_by: str = setting("likelihood", "random: drop as many at random", choices=("likelihood", "random"))
    alpha: float = setting(1.0, "strength of teacher confidence in the weights", 0)
    beta: float = setting(1.0, "strength of student confusion in the weights", 0)
    token_weights: str = setting("soft", "hard: the heavier half", choices=("soft", "hard", "shuffled"))
    loss_agg: str = setting("token-mean", "what the loss is a mean over", choices=("token-mean", "seq-mean"))
    temperature: float = setting(1.0, "of student and teacher, sampling and scoring", 1e-6)
    batch_size: int = setting(64, "rollouts a step, over all ranks", 1, 10**6)
    rollouts_per_prompt: int = setting(1, "rollouts of each prompt in a step", 1)
    max_new_tokens: int = setting(1024, "longest response, in tokens", 1, 10**6)
    lr: float = setting(1e-6, "constant learning rate of AdamW (betas 0.9, 0.999)", 1e-12)
    weight_decay: float = setting(0.01, "decoupled weight decay", 0)
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm", 1e-6)
    steps: int = setting(100, "steps; 0 checks everything, evaluates and stops", 0, 999999)
    seed: int = setting(0, "of prompt order, sampling and the tiny pair", 0, 2**32 - 1)
    teacher: list = setting((), "checkpoint folder or hub name; of several each as NAME=PATH")
    student: str = setting("", "checkpoint folder or hub name")
    prompts: str = setting("", "JSON Lines: prompt or problem; optional answer, teacher, group, tools")
    eval_prompts: str = setting("", "held-out prompts in the same format")
    chat_template: str = setting("auto", "auto: the tokenizer's, if any", choices=("auto", "none"))
    enable_thinking: bool = setting(False, "passed on to the chat template")
    max_prompt_tokens: int = setting(1024, "longer prompts are dropped", 1)
    rollout_batch_size: int = setting(64, "rows generated at once on a rank", 1)
    micro_batch_tokens: int = setting(8192, "tokens in a forward pass of scoring and update", 1)
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    shard: bool = setting(False, "FSDP2 instead of DDP: shard student, optimizer, teachers")
    dtype: str = setting("bfloat16" if torch.cuda.is_available() else "float32", "of teachers and products",
                         choices=("float32", "bfloat16"))
    output_dir: str = setting("", "new folder for metrics and checkpoints [runs/<time>]")
    resume: bool = setting(False, "continue the newest checkpoint in --output-dir")
    eval_every: int = setting(0, "steps between evaluations [0: before and after]", 0)
    save_every: int = setting(0, "steps between checkpoints [0: at the end]", 0)
    keep: int = setting(2, "checkpoints to keep", 1)
    config: str = setting("", "JSON file of settings; the command line wins over it")
    task: str = setting("foreign", "which tiny task of tiny_config.json")
    tiny: dict = setting(None, "(JSON only) how the tiny pair is made")

# --- Ranks: torchrun starts one process a GPU; each writes, grades and trains its share of the rows ---------
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES= hides the GPUs
CHUNK = 128 if DEVICE == "cpu" else 1024  # tokens that have logits at a time
STOP = threading.Event()  # set by SIGTERM and SIGINT

def sum_over_ranks(table=torch.zeros(1)):  # of no table: the ranks wait for each other
    """Sum a CPU tensor over the ranks, in place. Each rank fills its own rows of a zeroed [B, T] table: the
    sum is the whole table, to the bit, and from it all ranks compute the same filter, weights and metrics."""
    if dist.is_initialized():
        dist.all_reduce(table)
    return table

# --- Policies: a causal LM, teacher or student, as the method sees it ---------------------------------------
class RolloutCache(DynamicCache):
    """Keys and values in the type of the values: under autocast rotary embeddings leave the keys in float32,
    the cache would follow them, and all of it be cast to bfloat16 again for every token."""
    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)

class Policy(nn.Module):
    """`forward` scores given responses, `sample` writes new ones, both at the same temperature."""
    SEGMENT = 64  # tokens between two looks at which rows have ended

    def __init__(self, model, eos_ids, vocabulary, config):
        super().__init__()
        self.model, self.eos_ids, self.temperature = model, eos_ids, config.temperature
        # Embeddings are padded: the rows beyond the shared vocabulary, or at a gap in it, are no tokens.
        self.vocab_size = max(vocabulary) + 1  # V
        gaps = [i for i in range(self.vocab_size) if i not in vocabulary]
        self.gaps = torch.tensor(gaps, dtype=torch.long, device=DEVICE)
        self.autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, config.dtype == "bfloat16")

    def forward(self, ids, response):
        """log pi(y_t) and, without gradients, H_t of the response. ids, response bool, both returns [b, L]"""
        with self.autocast():
            # Padding is on the right, where the real tokens of a causal model cannot see it: no mask needed.
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [b, L, D]
            hidden = hidden[:, :-1][response[:, 1:]]  # [n, D]: position t - 1 predicts token t
            head = self.model.get_output_embeddings()
            bias = getattr(head, "bias", None)
            if bias is not None or len(self.gaps):
                bias = torch.zeros(self.vocab_size, device=DEVICE) if bias is None else bias[:self.vocab_size]
                bias = bias.index_fill(0, self.gaps, -torch.inf)
            flat = token_log_probs_and_entropy(  # [n], [n]
                hidden, head.weight[:self.vocab_size], ids[response], self.temperature, CHUNK, bias,
                with_entropy=not torch.is_grad_enabled())  # an update needs none
        return [x.new_zeros(ids.shape).masked_scatter(response, x) for x in flat]

    @torch.no_grad()
    def sample(self, prompts, uniforms):
        """One response to each prompt: b lists of ids, uniforms [b, T] -> tokens, log_probs, entropy [b, T].
        What follows a row's EOS means nothing. Rows that have ended leave the batch and its cache now and
        then: a batch must not pay b times for its longest row."""
        assert uniforms.dtype == torch.float64  # rounded to less, one could be 1
        uniforms = uniforms.to(DEVICE)
        b, length = uniforms.shape
        pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        prompts = [torch.tensor(prompt, device=DEVICE) for prompt in prompts]
        ids, attention = pad(prompts), pad([torch.ones_like(prompt) for prompt in prompts])  # [b, width]
        tokens = torch.zeros(b, length, dtype=torch.long, device=DEVICE)
        log_probs, entropy = torch.zeros(2, b, length, device=DEVICE)
        rows = torch.arange(b, device=DEVICE)
        cache = RolloutCache(config=self.model.config)
        with self.autocast():  # keeps the bf16 weights that it casts for all tokens of this call
            for t in range(length):
                if t and t % self.SEGMENT == 0:
                    going = (~is_eos(tokens[rows, :t], self.eos_ids).any(1)).nonzero()[:, 0]  # of n rows here
                    if not len(going):
                        break
                    ids, attention, rows = ids[going], attention[going], rows[going]
                    cache.reorder_cache(going)
                logits = self.model(
                    input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True,
                    position_ids=(attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:],  # left padding
                    logits_to_keep=1).logits[:, -1, :self.vocab_size]  # [n, V]
                logits.index_fill_(1, self.gaps, -torch.inf)
                tokens[rows, t], log_probs[rows, t], entropy[rows, t] = sample_tokens(
                    logits, uniforms[rows, t], self.temperature)  # [n]
                ids = tokens[rows, t:t + 1]  # [n, 1]
                attention = torch.cat([attention, torch.ones_like(ids)], 1)
        return tokens.cpu(), log_probs.cpu(), entropy.cpu()

# --- One step: rollout, score, filter, reweight, update -----------------------------------------------------
SAMPLE, EVALUATE, ORDER, FILTER, SHUFFLE, PRETRAIN = range(6)  # of a seed's key, one number a purpose

def uniforms(seed, *key, rows=(0,), width):
    """Uniforms in [0, 1), [b, width] float64. Row i's are a function of (seed, key, i) alone, not of rank,
    batch or what was drawn before: so 1, 2 and 4 ranks are the same run up to the rounding of floats, all
    arms of a comparison meet the same randomness, and resuming restores no generator."""
    drawn = [default_rng((seed, *key, i)).random(width) for i in rows]
    return torch.tensor(np.array(drawn))

@dataclass
class Prompt:
    ids: list  # token ids, the same for the student and its teacher
    answer: str  # None if unknown
    teacher: str  # the name of the teacher that grades it
    group: str  # evaluation figures are also given per group

@dataclass
class Run:
    """What a run holds: filled by `load`, used by every phase."""
    config: Config
    tokenizer: object
    prompts: list
    eval_prompts: list
    student: Policy = None
    trained: nn.Module = None  # the student as the update sees it: plain, in DDP, or sharded
    teachers: dict = field(default_factory=dict)  # name -> Policy
    optimizer: torch.optim.Optimizer = None
    step: int = 0  # steps done
    failures: int = 0  # consecutive steps without an update

@dataclass
class Rollouts:
    """The trajectories of one step as tables on the CPU, the same on every rank. Prompt and response of a row
    are padded on the right to [B, L]; a figure stands at the token that it is of, and 0 off the responses."""
    prompts: list  # B prompts
    lengths: list  # B numbers of tokens, prompt + response
    ids: Tensor  # [B, L]
    response: Tensor  # [B, L] bool, the response mask
    log_probs: Tensor  # [B, L] log pi_S(y_t) of the sampler
    student_entropy: Tensor  # [B, L] H_S,t of the sampler
    teacher_log_probs: Tensor = None  # [B, L]
    teacher_entropy: Tensor = None  # [B, L]
    scores: Tensor = None  # [B]
    keep: Tensor = None  # [B] bool
    weights: Tensor = None  # [B, L], 0 if dropped

    def of_teacher(self, name):  # the rows that it grades
        return [i for i, prompt in enumerate(self.prompts) if prompt.teacher == name]

    def batch(self, rows, *tables):
        """These rows of some tables, on the device, as wide as the longest; of no rows one row of zeros."""
        width = max([self.lengths[i] for i in rows], default=2)
        tables = [table[rows or [0], :width].to(DEVICE) for table in tables]
        return tables if rows else [torch.zeros_like(table) for table in tables]

def train_step(run):
    """One step of FiRe-OPD. -> rollouts, metrics"""
    config, times = run.config, [clock()]
    r = rollout(run, step_prompts(run), SAMPLE, run.step)  # 1. the student writes
    times.append(clock())
    score(run, r)  # 2. the teacher grades
    times.append(clock())
    scores = random_scores(run, r) if config.filter_by == "random" else r.scores
    r.keep = filter_trajectories(scores, config.filter_percentile)  # 3. filter
    r.weights = token_weights(r.teacher_entropy, r.student_entropy, r.response & r.keep[:, None],
                              config.alpha, config.beta)  # 4. reweight
    if config.token_weights != "soft":
        r.weights = control_weights(run, r)
    metrics = update(run, r)  # 5. loss, 6. update
    times.append(clock())
    return r, dict(step=run.step + 1) | metrics | measure_step(run, r, times)

def step_prompts(run):
    """The prompts of this step: each epoch is a fresh permutation of all of them."""
    config, n, chosen = run.config, len(run.prompts), []
    count = config.batch_size // config.rollouts_per_prompt
    epoch, start = divmod(run.step * count, n)
    while len(chosen) < count:
        order = default_rng((config.seed, ORDER, epoch)).permutation(n)
        chosen += order[start:start + count - len(chosen)].tolist()
        epoch, start = epoch + 1, 0
    return [run.prompts[i] for i in chosen for _ in range(config.rollouts_per_prompt)]

def rollout(run, prompts, *key):
    """Step 1. The student writes one response to each prompt, each rank its share. -> Rollouts"""
    config, B, T = run.config, len(prompts), run.config.max_new_tokens
    tokens = torch.zeros(B, T, dtype=torch.long)
    log_probs, entropy = torch.zeros(2, B, T)
    mine = range(RANK, B, WORLD_SIZE)
    for start in range(0, len(mine), config.rollout_batch_size):
        rows = list(mine[start:start + config.rollout_batch_size])
        tokens[rows], log_probs[rows], entropy[rows] = run.student.sample(
            [prompts[i].ids for i in rows], uniforms(config.seed, *key, rows=rows, width=T))
    for table in (tokens, log_probs, entropy):
        sum_over_ranks(table)
    return lay_out(prompts, run.student.eos_ids, tokens, log_probs, entropy)

def lay_out(prompts, eos_ids, tokens, log_probs, entropy):
    """Move the sampler's tables [B, T] behind their prompts. -> Rollouts, with tables [B, L]"""
    mask = response_mask(tokens, eos_ids)  # [B, T]

    def behind_prompts(table):  # [B, T] -> [B, L]
        return pad_sequence([torch.cat([table.new_zeros(len(prompt.ids)), row[valid]])
                             for prompt, row, valid in zip(prompts, table, mask)], batch_first=True)

    lengths = [len(prompt.ids) + n for prompt, n in zip(prompts, mask.sum(1).tolist())]
    r = Rollouts(prompts, lengths, *map(behind_prompts, (tokens, mask, log_probs, entropy)))
    for ids, prompt in zip(r.ids, prompts):
        ids[:len(prompt.ids)] = torch.tensor(prompt.ids)
    return r

@torch.no_grad()
def score(run, r):
    """Step 2. Each row's own teacher gives log pi_T(y_t) and H_T,t; their means are the trajectory scores."""
    log_probs, entropy = torch.zeros(2, *r.ids.shape)  # [B, L]
    for name, teacher in run.teachers.items():
        for rows in micro_batches(r.of_teacher(name), r.lengths, run.config.micro_batch_tokens):
            ids, response = r.batch(rows, r.ids, r.response)
            for table, x in zip((log_probs, entropy), teacher(ids, response)):  # [B, L], [b, l]
                table[rows, :ids.shape[1]] = x.cpu()
    r.teacher_log_probs, r.teacher_entropy = sum_over_ranks(log_probs), sum_over_ranks(entropy)
    r.scores = trajectory_scores(r.teacher_log_probs, r.response)

def update(run, r):
    """Steps 5 and 6, on the kept trajectories: the others never enter the student's forward. -> metrics
    Their gradient is summed up in micro-batches that fit into memory. However they are cut, over these and
    over ranks, it is the same: what divides it is counted before the cut."""
    config, loss = run.config, torch.zeros(())
    rows = r.keep.nonzero()[:, 0].tolist()
    weights, count = r.weights, int(r.response[rows].sum())
    if config.loss_agg == "seq-mean":  # the mean over trajectories of their own means
        weights, count = weights / r.response.sum(1, keepdim=True).clamp(min=1), len(rows)
    micros = micro_batches(rows, r.lengths, config.micro_batch_tokens)
    ddp = isinstance(run.trained, DistributedDataParallel)
    for micro in micros:
        ids, response, teacher, w = r.batch(micro, r.ids, r.response, r.teacher_log_probs, weights)  # [b, L]
        # DDP exchanges gradients in the last backward only; no_sync must surround forward AND backward.
        with run.trained.no_sync() if ddp and micro is not micros[-1] else nullcontext():
            log_probs, _ = run.trained(ids, response)  # [b, L]
            # This very pass is the old policy too: its log-probs make the ratio 1, the sampler's would not.
            part = policy_loss(log_probs, log_probs.detach(), teacher, w, response, count)
            (part * WORLD_SIZE).backward()  # DDP and FSDP average over the ranks; these losses add
        loss += part.detach().cpu()
    loss = sum_over_ranks(loss).item()
    norm = nn.utils.clip_grad_norm_(run.student.parameters(), config.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of a sharded student
    updated = bool(rows) and isfinite(loss + norm) and bool(r.log_probs.isfinite().all())
    if updated:  # else the parameters stay as they are
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=not ddp)  # DDP's buckets are the gradients: not twice
    return dict(loss=loss if updated else nan, grad_norm=norm, skipped_updates=int(not updated))

def micro_batches(rows, lengths, budget):
    """This rank's share of `rows`, in lists of at most `budget` tokens with padding (or of one row).
    Sorted by length, so that hardly anything is padding. Every rank gets the same number of lists, if need be
    empty ones: a rank that keeps no trajectory must still take part in every collective of the models."""
    cuts, most = [], -(-len(rows) // WORLD_SIZE)  # spread over the ranks before filling a budget
    for i in sorted(rows, key=lambda i: (-lengths[i], i)):
        if not cuts or len(cuts[-1]) == most or (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > budget:
            cuts.append([])
        cuts[-1].append(i)
    cuts += [[] for _ in range(-len(cuts) % WORLD_SIZE)]
    return cuts[RANK::WORLD_SIZE]

# --- The run ------------------------------------------------------------------------------------------------
def train(config):
    """A whole run, or with --resume the rest of one. Told to stop, it saves after its step. -> finished?"""
    run = load(config)
    newest = read_log(config.output_dir)[-1:] if config.resume and RANK == 0 else []
    missed = due(run, config.eval_every) and any("loss" in row for row in newest)  # by a kill after the save
    if not config.resume or sum_over_ranks(torch.tensor(float(missed))):
        evaluate(run)
    with progress(config.steps, "distil", run.step) as bar:
        # All ranks ask together, so that they stop after the same step.
        while run.step < config.steps and not sum_over_ranks(torch.tensor(float(STOP.is_set()))):
            rollouts, metrics = train_step(run)
            run.step += 1
            report(run, bar, rollouts, metrics)
            if run.failures == 3:
                save_checkpoint(run)
                raise UserError(f"step {run.step}: three steps without an update (nothing kept, or NaN); "
                                f"its last good weights are saved; lower --lr, check the teacher")
            if due(run, config.save_every):
                save_checkpoint(run)
            if due(run, config.eval_every):
                evaluate(run)
    if run.step < config.steps:
        save_checkpoint(run)
    if config.steps:
        summary(run)
    return run.step >= config.steps

def due(run, every):  # after the last step, and before as often as wanted
    return run.step == run.config.steps or every and run.step % every == 0

# === The method ends here. What follows is plumbing: controls, metrics, flags, prompts, models, files =======

# --- Controls: what the filter and the weights have to beat -------------------------------------------------
def random_scores(run, r):  # [B], to drop as many trajectories as the teacher's scores would
    noise = uniforms(run.config.seed, FILTER, run.step, width=len(r.scores))[0]
    return noise.masked_fill(~r.scores.isfinite(), torch.nan)

def control_weights(run, r):  # [B, L], each with the mean of 1 that the soft ones have
    (B, L), weights = r.ids.shape, torch.zeros(r.ids.shape)
    noise = uniforms(run.config.seed, SHUFFLE, run.step, rows=range(B), width=L)
    for i in r.keep.nonzero()[:, 0]:
        mask = r.response[i]  # [L]
        soft = r.weights[i, mask]  # [n]
        if run.config.token_weights == "shuffled":  # the same weights on other tokens
            weights[i, mask] = soft[noise[i, mask].argsort()]
        else:  # hard: the heavier half, all alike
            heavy = soft.argsort(descending=True)[:(len(soft) + 1) // 2]
            weights[i, mask] = torch.zeros_like(soft).index_fill(0, heavy, len(soft) / len(heavy))
    return weights

# --- Metrics and evaluation ---------------------------------------------------------------------------------
def clock():
    if torch.cuda.is_initialized():  # kernels are only queued: wait for them
        torch.cuda.synchronize()
    return time.perf_counter()

def is_correct(response, answer):
    """Whether the last \\boxed{...} is the answer (or its box), else the response or its last number."""
    def boxed(text):  # braces may nest three deep
        return re.findall(r"\\boxed{((?:[^{}]|{(?:[^{}]|{(?:[^{}]|{[^{}]*})*})*})*)}", text)[-1:]
    def clean(text):
        text = re.sub(r"\\text\{([^{}]*)\}", r"\1", re.sub(r"\s|\\[ ,!;]", "", text)).replace("dfrac", "frac")
        text = re.sub(r"\\?[$%]|\{,\}|\\(left|right)(?![a-z])|(?<=\d),(?=\d{3}(?!\d))", "", text)
        text = re.sub(r"^(-?)\.", r"\g<1>0.", text.rstrip("."))
        return re.sub(r"(\.\d*[1-9])0+$|\.0+$", r"\1", text)
    response = response.replace("\u2212", "-")
    answer = clean((boxed(answer) or [answer.split("####")[-1]])[0])
    if boxes := boxed(response):
        return clean(boxes[0]) == answer
    number = r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\d.])-?\.\d+"
    return answer in (clean(response), *map(clean, re.findall(number, response)[-1:]))

def measure(run, r, groups):  # groups {suffix: rows [B] bool} -> {figure + suffix: float}
    figures = {}
    log_ratio = r.log_probs - r.teacher_log_probs  # [B, L] k1 estimate of the reverse KL
    ended = (is_eos(r.ids, run.student.eos_ids) & r.response).any(1)  # [B]
    correct = torch.full(ended.shape, nan)  # [B] where an answer is known
    for i, prompt in enumerate(r.prompts):
        if prompt.answer is not None:
            text = run.tokenizer.decode(r.ids[i][r.response[i]], skip_special_tokens=True)
            correct[i] = is_correct(text, prompt.answer)
    for suffix, rows in groups.items():
        valid = r.response & (rows & r.scores.isfinite())[:, None]  # [B, L]
        group = dict(
            reverse_kl=log_ratio[valid], score=r.scores[valid.any(1)],
            teacher_entropy=r.teacher_entropy[valid], student_entropy=r.student_entropy[valid],
            response_length=r.response[rows].sum(1), truncated_ratio=~ended[rows])
        if not correct[rows].isnan().all():
            group["exact_match"] = correct[rows & ~correct.isnan()]
        figures |= {name + suffix: values.float().mean().item() for name, values in group.items()}
    return figures

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16; on anything else MFU is null

def forward_flops(policy, tokens):  # 2 a parameter and token; neither attention nor experts not chosen
    chosen = getattr(policy.model.config.get_text_config(), "num_experts_per_tok", None)
    active = 0
    for name, p in policy.named_parameters():  # transformers stacks the experts of a layer: [experts, ...]
        active += p.numel() * np.mean(chosen) / len(p) if chosen and ".experts." in name else p.numel()
    return 2 * tokens * active

def measure_step(run, r, times):  # of all rows, the kept and the dropped, of weights and speed
    keep, lengths = r.keep, torch.tensor(r.lengths)
    figures = measure(run, r, {"": torch.ones_like(keep), "_kept": keep, "_dropped": ~keep})
    for name in run.teachers if len(run.teachers) > 1 else ():
        figures[f"keep_ratio/{name}"] = keep[r.of_teacher(name)].float().mean().item()
    weights = r.weights[r.response & keep[:, None]]  # [n]
    seconds = np.diff(times)  # of rollout, score, update
    scoring = sum(forward_flops(teacher, lengths[r.of_teacher(name)].sum().item())
                  for name, teacher in run.teachers.items())
    training = 3 * forward_flops(run.student, lengths[keep].sum().item())  # backward is twice the forward
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    peak = WORLD_SIZE * next((flops for name, flops in PEAK_FLOPS.items() if name in card), nan)
    return figures | dict(
        keep_ratio=keep.float().mean().item(),
        filter_threshold=min(r.scores[keep].tolist(), default=nan),  # the lowest score that was kept
        weight_ess=(weights.mean() ** 2 / weights.square().mean()).item(),  # effective sample size
        seconds_rollout=seconds[0], seconds_score=seconds[1], seconds_update=seconds[2],
        tokens_per_second=r.response.sum().item() / seconds.sum(),
        mfu_score=scoring / seconds[1] / peak, mfu_update=training / seconds[2] / peak,
        peak_memory_gb=torch.cuda.max_memory_allocated() / 2 ** 30 if card else nan)

def evaluate(run):  # on the held-out prompts, always from the same uniforms
    if not run.eval_prompts:
        return
    r = rollout(run, run.eval_prompts, EVALUATE)
    score(run, r)
    groups = {"": torch.ones_like(r.scores).bool()}
    for name in sorted({prompt.group for prompt in r.prompts} - {""}):
        groups[f"/{name}"] = torch.tensor([prompt.group == name for prompt in r.prompts])
    figures = measure(run, r, groups)
    say(f"step {run.step}: evaluation: " + ", ".join(
        f"{name} {x:.3f}" for name, x in figures.items() if re.match("reverse_kl|exact_match", name)))
    log(run, dict(step=run.step) | {f"eval/{name}": value for name, value in figures.items()})

# --- The screen and the log ---------------------------------------------------------------------------------
def visible(text):  # control characters spelled out: no rollout can move the terminal's cursor
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)

def say(text):
    with suppress(OSError):  # a pipe that was closed ends no run
        if RANK == 0:
            tqdm.write(visible(text))
            sys.stdout.flush()

def note(text, follows=None):  # a line of the report at the start: ok, or a warning with what follows
    say(f"warning  {text}: {follows}" if follows else f"     ok  {text}")

def progress(steps, label, done=0):  # a bar over the steps that are left; on a terminal only
    return tqdm(range(done, steps), label, steps, initial=done, leave=False, disable=RANK > 0 or None)

def report(run, bar, r, metrics):  # to log and screen; at both ends of a run two rollouts
    log(run, metrics)
    run.failures = 0 if isfinite(metrics["loss"]) else run.failures + 1
    line = "reverse_kl {reverse_kl:.3f}, length {response_length:.0f}, {tokens_per_second:.0f} tokens/s"
    line = line.format(**metrics)
    bar.update()
    bar.set_postfix_str(line)
    if bar.disable and run.step % max(1, run.config.steps // 10) == 0:  # no terminal
        say(f"step {run.step}/{run.config.steps}: {line}")
    examples = [*r.keep.nonzero()[:1, 0], *(~r.keep).nonzero()[:1, 0]]
    for i in examples if run.step in (1, run.config.steps) else ():
        decode, verdict = run.tokenizer.decode, "kept" if r.keep[i] else "DROPPED"
        tokens = [f"{decode(r.ids[i, t])}({r.teacher_log_probs[i, t]:.2f}, {r.weights[i, t]:.2f})"
                  for t in r.response[i].nonzero()[:200, 0]]
        say(f"{verdict} in step {run.step}, score {r.scores[i]:.3f}, token(log pi_T, weight):\n"
            f"    {decode(r.prompts[i].ids)[-80:]!r} -> {' '.join(tokens)}")

def summary(run):  # the first and the last value of what matters, and the commands to type next
    folder, rows = run.config.output_dir, read_log(run.config.output_dir)
    say(f"\n{'':24}{'first':>12}{'last':>12}")
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values and re.match("eval/(exact|reverse)|keep_ratio$|reverse_kl(_kept)?$|response_length$", name):
            say(f"{name:24}{values[0]:12.3f}{values[-1]:12.3f}")
    newest, command = checkpoints(folder)[-1], f"python {sys.argv[0]} --config {folder}/config.json"
    steps = run.config.steps * (1 if run.step < run.config.steps else 2)
    say(f"\n{run.step} of {run.config.steps} steps, metrics in {folder}/metrics.jsonl. Next:\n"
        f"  go on     {command} --resume --steps {steps}\n"
        f"  evaluate  {command} --steps 0 --student {newest}\n"
        f"  use       transformers.pipeline('text-generation', '{newest}')")

def log(run, row):
    if RANK == 0 and run.config.steps:
        row = {name: x if isfinite(x) else None for name, x in row.items()}  # JSON has no NaN
        path = Path(run.config.output_dir, "metrics.jsonl")
        with explain(path, "make room and --resume"), path.open("a") as file:
            file.write(json.dumps(row) + "\n")

def read_log(folder):  # -> rows in the order of the run; those of evaluations have no loss
    rows = []
    for line in Path(folder, "metrics.jsonl").read_bytes().splitlines():
        with suppress(ValueError):  # a full disk may have torn the last line
            rows.append(json.loads(line))
    return rows

# --- The command line ---------------------------------------------------------------------------------------
SETTINGS = {f.name: f for f in dataclasses.fields(Config)}
MAY_DIFFER = ("output_dir steps eval_every save_every keep rollout_batch_size micro_batch_tokens "
              "gradient_checkpointing shard")  # on resume

class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""

@contextmanager
def explain(what, advice):  # turns whatever a library raises on a user's file into one line
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "  # ours speak for themselves
        raise UserError(f"{what}: {name}{' '.join(str(error).split())[:300]}; {advice}") from error

def parse_config(argv=None):
    """Defaults, then the JSON file, then the command line. No models and no --config: the tiny default."""
    def refuse(message):
        raise UserError(f"command line: {message}; see --help")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    for name, f in SETTINGS.items():
        kinds = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(action="append")}
        kind = kinds.get(f.type, dict(type=f.type, choices=f.metadata["choices"]))
        text = f.metadata["text"].replace("%", "%%") + f" [{f.default}]" * (f.default not in ("", ()))
        if f.type is not dict:
            parser.add_argument("--" + name.replace("_", "-"), help=text, default=argparse.SUPPRESS, **kind)
    flags, strange = parser.parse_known_args(argv)
    flags, settings = vars(flags), {}
    path = flags.get("config", "")
    if not path and not flags.keys() & {"teacher", "student", "prompts", "eval_prompts"}:
        path = Path(__file__).with_name("tiny_config.json")
    if path:
        with explain(f"config {path}", "give a JSON object of settings, such as a run's config.json"):
            settings = dict(json.loads(Path(path).read_bytes()).items())
    if isinstance(settings.get("teacher"), str):
        settings["teacher"] = [settings["teacher"]]
    for name in [*strange, *settings.keys() - SETTINGS.keys()]:
        near = difflib.get_close_matches(name.replace("-", "_"), SETTINGS, 1, cutoff=0)[0].replace("_", "-")
        raise UserError(f"command line, {path}: unknown setting {name[:80]!r}; the nearest is --{near}")
    config = Config(**settings | flags)
    check(config)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and checkpoints(config.output_dir or os.devnull):
        config.resume = True  # torchrun --max-restarts has started us again
    return config

def check(config):  # types, choices and bounds, wherever a setting came from, and what must go together
    for name, f in SETTINGS.items():
        value, (_, low, high, choices) = getattr(config, name), f.metadata.values()
        fits = type(value) in ((int, float) if f.type is float else (f.type, type(f.default)))
        if not fits or low is not None and not low <= value <= high or choices and value not in choices:
            wanted = f"in [{low}, {high}]" if low is not None else " or ".join(choices or [f.type.__name__])
            raise UserError(f"{name} must be {wanted}, got {str(value)[:80]!r}; see --help")
    missing = [f"--{name}" for name in ("teacher", "student", "prompts") if not getattr(config, name)]
    if config.tiny and (len(missing) < 3 or config.eval_prompts):
        raise UserError(f"the tiny pair of {config.config} brings its own models and prompts; leave one out")
    if missing and not config.tiny:
        raise UserError(f"--teacher, --student and --prompts go together; add {', '.join(missing)}")
    if config.batch_size % config.rollouts_per_prompt or config.batch_size % WORLD_SIZE:
        raise UserError(f"batch_size must be a multiple of rollouts_per_prompt and of the {WORLD_SIZE} ranks")
    if config.resume and not (config.output_dir and config.steps):
        raise UserError("command line: --resume needs --steps and --output-dir, the folder of the run")

# --- Prompts ------------------------------------------------------------------------------------------------
def text_of(content):  # of a message; other tools write it as a list of parts
    if content is None or isinstance(content, str):
        return content
    content = content if isinstance(content, list) else [content]
    if other := [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]:
        raise ValueError(f"only content parts of type 'text' are supported, got {str(other[0])[:60]}")
    return "".join(part["text"] for part in content)

def tokenize(prompt, tokenizer, config, tools=None):  # a string or messages -> ids, as the template wants
    if config.chat_template == "none" or not tokenizer.chat_template:
        if tools or isinstance(prompt, list):
            raise ValueError("tools and lists of messages need a chat template")
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        if ids[:2] == [tokenizer.bos_token_id] * 2:  # the text brought one along
            ids = ids[1:]
        if ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # the tokenizer closed what the student is to go on with
        return ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[-1]["role"] == "assistant":  # a row of a fine-tuning set: its reply is not for us
        messages = messages[:-1]
    messages = [message | {"content": text_of(message.get("content"))} for message in messages]
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=config.enable_thinking)

def parse_prompt(config, row, tokenizer, vocabulary, teachers):  # a ValueError says what is wrong with it
    row = {key: x for key, x in row.items() if x not in (None, "", [])}
    first = lambda *keys: next((row[key] for key in keys if key in row), None)
    listed = lambda key: json.loads(row[key]) if isinstance(row.get(key), str) else row.get(key)
    content = first("prompt", "problem", "question") or listed("messages")
    answer = first("answer", "ground_truth", "solution")
    teacher = str(row.get("teacher", teachers[0] if len(teachers) == 1 else None))
    if not isinstance(content, (str, list)):
        raise ValueError("no prompt: give 'prompt' (a string or messages) or 'problem'")
    if isinstance(answer, (bool, dict, list)):
        raise ValueError(f"'answer' must be a string or a number, got {str(answer)[:60]}")
    if teacher not in teachers:
        raise ValueError(f"teacher {teacher!r} is not one of {', '.join(teachers)}: give --teacher NAME=PATH")
    ids = list(tokenize(content, tokenizer, config, listed("tools")))
    if not ids or set(ids) - vocabulary:
        strange = tokenizer.convert_ids_to_tokens(list(set(ids) - vocabulary))
        raise ValueError(f"{strange} are unknown to a model" if strange else "the prompt has no tokens")
    return Prompt(ids, None if answer is None else str(answer), teacher, str(row.get("group", "")))

def load_prompts(config, path, *about):  # of JSON Lines; those that are too long are dropped
    prompts, longest = [], config.max_prompt_tokens
    with explain(path, "give a JSON Lines file; paths start at the current folder"), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with explain(f"{path} line {number}", "each line must be a JSON object in UTF-8, with a prompt"):
                if text := line.decode("utf-8-sig").strip():
                    row = dict(json.loads(text).items())
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                    prompts.append(parse_prompt(config, row, *about))
    kept = [prompt for prompt in prompts if len(prompt.ids) <= longest]
    if len(kept) < WORLD_SIZE:
        raise UserError(f"{path}: of {len(prompts)} prompts {len(kept)} have at most --max-prompt-tokens "
                        f"{longest}, for {WORLD_SIZE} ranks; add some or raise it")
    note(f"{path}: {len(kept)} prompts of at most {max(len(prompt.ids) for prompt in kept)} tokens",
         len(kept) < len(prompts) and f"{len(prompts) - len(kept)} longer than {longest} tokens are dropped")
    return kept

# --- Models -------------------------------------------------------------------------------------------------
Source = collections.namedtuple("Source", "name folder config tokenizer")  # a checkpoint before it is loaded

def teacher_paths(config):  # --teacher math=PATH --teacher code=PATH -> {"math": PATH, "code": PATH}
    named = {}
    for entry in config.teacher:
        match = re.fullmatch(r"([\w-]+)=(.+)", str(entry))
        name, path = match.groups() if match else ("teacher", entry)
        if name in (*named, "student"):
            raise UserError(f"command line: --teacher {entry!r}: give each teacher a NAME=PATH of its own")
        named[name] = path
    return named

def open_source(name, path):  # a folder, or the snapshot of a hub name. -> Source
    folder = Path(path)
    if not os.path.isdir(path):
        with explain(f"{name} {path}", "no such folder; give one, or a hub name such as Qwen/Qwen3-0.6B"):
            folder = Path(huggingface_hub.snapshot_download(
                path, etag_timeout=5, allow_patterns="*.safetensors *.json *.jinja *.model *.txt".split()))
    with explain(f"{name} {path}", "give a complete checkpoint folder, tokenizer included"):
        if (folder / "adapter_config.json").exists():
            raise ValueError("this is a LoRA adapter: merge it into its base model")
        config, tokenizer = (auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                             for auto in (AutoConfig, AutoTokenizer))
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(config.get_text_config(), key, None) not in (None, 1):
                raise ValueError(f"its {key} is not supported: logits must be hidden @ W.T")
    return Source(name, folder, config, tokenizer)

def check_positions(source, longest):  # of prompt and response
    c = source.config.get_text_config()
    limit = getattr(c, "max_position_embeddings", None) or getattr(c, "max_seq_len", None)
    rope = getattr(c, "rope_parameters", None) or {}
    for r in [rope, *(r for r in rope.values() if isinstance(r, dict))]:  # of all layers, or by their types
        original = r.get("original_max_position_embeddings") or limit
        if r.get("rope_type") in ("longrope", "dynamic"):
            limit = original  # beyond, the longest row of a batch would change the log-probs of the others
        elif r.get("rope_type") == "yarn":
            limit = int(r["factor"] * original)
    if limit and longest > limit:
        raise UserError(f"{source.name} {source.folder}: prompt and response may take {longest} tokens, its "
                        f"positions end at {limit}; lower --max-new-tokens or --max-prompt-tokens")

def shared_vocabulary(student, teachers):  # compared id by id: the padded widths of embeddings prove nothing
    ours, *others = ({i: token for token, i in source.tokenizer.get_vocab().items()}
                     for source in (student, *teachers))
    for teacher, theirs in zip(teachers, others):
        wrong = sorted(i for i in ours if theirs.get(i, ours[i]) != ours[i])
        if wrong or not ours.keys() & theirs:
            raise UserError(f"teacher {teacher.name}: {len(wrong)} of the student's {len(ours)} ids differ: "
                            f"{[(i, ours[i], theirs[i]) for i in wrong[:2]]}; choose a pair that shares them")
    rows = min(source.config.get_text_config().vocab_size for source in (student, *teachers))
    shared = {i for i in ours if i < rows and all(i in theirs for theirs in others)}
    note(f"vocabulary: {len(shared)} ids are sampled and graded", len(shared) < len(ours) and
         f"the student's other {len(ours) - len(shared)} have no embedding or are unknown to a teacher")
    return shared

def end_ids(model, tokenizer, config, vocabulary):  # the checkpoint's, and the template's end of turn
    ids = set()
    for source in (model.generation_config, model.config, tokenizer):
        listed = getattr(source, "eos_token_id", None)
        ids |= {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.chat_template and config.chat_template == "auto":
        with suppress(Exception):  # a template that renders no replies has no end of turn to offer
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@reply@"}]
            tail = tokenizer.apply_chat_template(turns, tokenize=False).split("@reply@")[-1].lstrip()
            first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
            ids |= set(first) & {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids & vocabulary

def load_model(source, dtype):  # on the host; complete, trainable and saveable
    what = f"{source.name} {source.folder}"
    model, info = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
        ignore_mismatched_sizes=True, trust_remote_code=False)
    if broken := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ValueError(f"{len(broken)} weights are missing or of another shape, such as {broken[0]}")
    if model.base_model is model or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} has no inner model or key/value cache: not supported")
    if extra := sorted(info["unexpected_keys"]):
        note(what, f"{len(extra)} weights of its file have no place in the model, such as {extra[0]}")
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:  # it could be read, but not be saved
        note(what, f"its generation config is invalid and left out: {str(error)[:60]} ...")
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.requires_grad_(False)
    if source.name == "student":  # not a vision tower: it gets no gradient from text, DDP would wait for it
        model.get_decoder().requires_grad_()
        model.get_output_embeddings().requires_grad_()
    return model.eval()  # no dropout: the policy that is trained is the one that wrote

def load_policy(source, config, vocabulary, mesh):  # in turns, so that the host holds a large model once
    student, bf16 = source.name == "student", config.dtype == "bfloat16"
    # AdamW at 1e-6 on bf16 weights rounds nearly every update away: the student's are float32 always.
    dtype = torch.bfloat16 if bf16 and not student else torch.float32
    for turn in range(WORLD_SIZE):
        if turn == RANK:
            with explain(f"{source.name} {source.folder}", "give a safetensors checkpoint of a causal LM"):
                model = load_model(source, dtype)
                ends = end_ids(model, source.tokenizer, config, vocabulary)
            policy = Policy(model, ends, vocabulary, config)
            lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
            layers = max(lists, key=lambda m: len(list(m.parameters())), default=[])
            for layer in layers if student and config.gradient_checkpointing else ():
                layer.forward = functools.partial(recomputed, layer.forward)
            if mesh:
                shard(policy, layers, mesh, student, bf16)
            policy.to(DEVICE)
        sum_over_ranks()
    return policy

def recomputed(forward, *args, **kwargs):  # torch's checkpointing; transformers' would need training mode
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)

def shard(policy, layers, mesh, student, bf16):
    """FSDP2. Teachers are gathered layer by layer; the student stays whole from its first sampled token to
    the backward pass: gathering it for every token would cost far more than the memory is worth."""
    options = dict(mesh=mesh, reshard_after_forward=not student)
    if student and bf16:  # inputs are left alone: uniforms in bf16 would be 1 now and then
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)  # not the inner model: the head may be tied to the embedding
    register_fsdp_forward_method(policy, "sample")

def load(config):  # everything a run needs, what is cheap first, reported line by line. -> Run
    if lost := [path for path in (config.prompts, config.eval_prompts) if path and not os.path.exists(path)]:
        raise UserError(f"{lost[0]}: no such file; paths start at the current folder")
    student = open_source("student", config.student)
    teachers = [open_source(name, path) for name, path in teacher_paths(config).items()]
    vocabulary = shared_vocabulary(student, teachers)
    about = student.tokenizer, vocabulary, [teacher.name for teacher in teachers]
    run = Run(config, student.tokenizer, load_prompts(config, config.prompts, *about),
              load_prompts(config, config.eval_prompts, *about) if config.eval_prompts else [])
    note(f"first prompt: {run.tokenizer.decode(run.prompts[0].ids)!r}")
    longest = max(len(prompt.ids) for prompt in run.prompts + run.eval_prompts) + config.max_new_tokens
    for source in (student, *teachers):
        check_positions(source, longest)
    open_output(config)
    mesh = init_device_mesh(DEVICE, (WORLD_SIZE,)) if config.shard and WORLD_SIZE > 1 else None
    load_student(run, student, vocabulary, mesh)
    for source in teachers:
        teacher = run.teachers[source.name] = load_policy(source, config, vocabulary, mesh)
        ends = f"student {sorted(run.student.eos_ids)}, {source.name} {sorted(teacher.eos_ids)}"
        note(f"end of sequence: {ends}", (teacher.eos_ids != run.student.eos_ids or not teacher.eos_ids) and
             "rollouts end at the student's, or at --max-new-tokens; their length may drift")
        if source.tokenizer.chat_template != run.tokenizer.chat_template and config.chat_template == "auto":
            note(f"{source.name} has another chat template", "it grades prompts rendered by the student's")
    self_test(run)  # after the optimizer's state: a forward leaves a sharded student whole
    with suppress(AttributeError, RuntimeError):  # some configurations do not tell these sizes
        report_memory(run, longest)
    return run

def load_student(run, source, vocabulary, mesh):  # and its optimizer
    config = run.config
    if config.resume:
        source = source._replace(folder=checkpoints(config.output_dir)[-1])
    student = run.student = run.trained = load_policy(source, config, vocabulary, mesh)
    if student.model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # two are slower for so small a model
    student.model.generation_config.eos_token_id = sorted(student.eos_ids) or None  # it is saved with it
    if WORLD_SIZE > 1 and not mesh:
        run.trained = DistributedDataParallel(student, gradient_as_bucket_view=True)
    run.optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], config.lr,
                                      betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
    if config.resume:
        resume(run, source.folder)
    # DDP lays out its buckets in its first two backwards and rounds otherwise there: a resumed run must not.
    nothing = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
    for _ in range(2 if run.trained is not student else 0):
        run.trained(nothing, nothing > 0)[0].sum().backward()
    run.optimizer.zero_grad(set_to_none=False)

@torch.no_grad()
def self_test(run):
    """Scoring must find what sampling found by transformers' own forward, with a cache and a padded row: no
    model passes that scales or caps its logits, or is given wrong positions or a wrong mask."""
    config, ordered = run.config, sorted(run.prompts, key=lambda prompt: len(prompt.ids))
    prompts = [ordered[0], ordered[-1]]
    drawn = uniforms(config.seed, EVALUATE, rows=range(2), width=min(16, config.max_new_tokens))
    limit = (1e-4 if config.dtype == "float32" else 0.2) / min(1, config.temperature)  # for rounding
    for name, policy in {"student": run.student, **run.teachers}.items():
        with explain(f"self-test of {name}", "such a model is not supported"):
            r = lay_out(prompts, policy.eos_ids, *policy.sample([prompt.ids for prompt in prompts], drawn))
            scored = policy(*r.batch([0, 1], r.ids, r.response))[0].cpu()  # [2, L]
            gap = (scored - r.log_probs)[r.response].abs().mean().item()
            found = f"log-probs of scoring and sampling are {gap:.1e} apart"
            if not gap < limit:
                cause = "it scales or caps its logits, or sees padding" if gap > 0 else "NaN in its weights?"
                raise ValueError(f"{found}: {cause}")
        note(f"self-test of {name}: {found}")

def report_memory(run, longest):  # what a rank needs at its peak, term by term as in the README, in bytes
    config, model = run.config, run.student.model
    c, size = model.config.get_text_config(), model.num_parameters()
    shards = WORLD_SIZE if config.shard else 1
    width = 2 if config.dtype == "bfloat16" else 4
    layers, hidden = c.num_hidden_layers, c.hidden_size
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    inner = getattr(c, "intermediate_size", None) or 4 * hidden
    rows = -(-max(config.batch_size, len(run.eval_prompts)) // WORLD_SIZE)
    tokens = min(max(config.micro_batch_tokens, longest), rows * longest)
    # Bytes that a layer keeps of a token for backward, fitted; recomputed, layers keep their input only.
    saved = 30 * hidden + width * (4 * inner + 5 * (c.num_attention_heads + heads) * head_dim)
    saved = saved + 4 * hidden * layers if config.gradient_checkpointing else saved * layers
    terms = dict(  # of the student: weights, gradients, two moments; a gathered copy or the casts of autocast
        student=size * (16 / shards + (width if shards > 1 or width == 2 else 0)),
        teachers=sum(p.nbytes for t in run.teachers.values() for p in t.parameters()) / shards,
        rollout=2 * layers * heads * head_dim * width * min(config.rollout_batch_size, rows) * longest,
        update=saved * tokens + 16 * CHUNK * c.vocab_size)
    need = sum(terms.values()) - min(terms["rollout"], terms["update"])  # one after the other
    there = torch.cuda.mem_get_info()[1] if DEVICE == "cuda" else (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / WORLD_SIZE)
    listed = ", ".join(f"{name} {term / 2**30:.2f}" for name, term in terms.items())
    note(f"a rank needs {need / 2**30:.2f} of {there / 2**30:.2f} GB: {listed}",
         need > there and "this will not fit; the README says what to lower")
    return terms

# --- Checkpoints --------------------------------------------------------------------------------------------
def open_output(config):  # of a new run, or of this one
    if RANK == 0 and config.steps:
        folder = Path(config.output_dir)
        settings, metrics = folder / "config.json", folder / "metrics.jsonl"
        now = {name: x for name, x in vars(config).items() if name not in ("config", "resume", "tiny")}
        with explain(f"output folder {folder}", "choose another --output-dir"):
            config.output_dir.encode()  # names that are not UTF-8 break the saving of tokenizers
            if config.resume != bool(checkpoints(folder)):
                raise ValueError("no complete checkpoint in it; start without --resume" if config.resume else
                                 "it holds a run already; continue it with --resume")
            before = json.loads(settings.read_bytes()) if settings.exists() or config.resume else now
            changed = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now
                       if name not in MAY_DIFFER.split() and before.get(name) != now[name]]
            if changed:
                raise ValueError(f"other settings: {'; '.join(changed)}; only {MAY_DIFFER} may differ")
            if not config.resume:
                folder.mkdir(parents=True, exist_ok=True)
                settings.write_text(json.dumps(now, indent=1))
                if metrics.exists():
                    metrics.replace(f"{metrics}.old")
                metrics.touch()
    sum_over_ranks()

@contextmanager
def complete_folder(folder):  # gets its name when all of it is on the disk: no kill leaves half of one
    temporary = Path(f"{folder}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    os.sync()
    temporary.rename(folder)

def checkpoints(folder):  # oldest first; only a complete one ever gets its name
    return sorted(Path(folder).glob("checkpoint-" + 6 * "[0-9]"))

STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # some weights get no gradient

def save_checkpoint(run):  # randomness and data position follow from seed and step
    model, folder = run.student.model, Path(run.config.output_dir, f"checkpoint-{run.step:06d}")
    weights = get_model_state_dict(model, options=STATE)  # collective: rank 0 gets the shards of all
    moments = {}
    if run.optimizer.state:  # else asking for it would make some, of a step that never was
        moments = get_optimizer_state_dict(run.trained, run.optimizer, options=STATE)
    if RANK == 0 and not folder.exists():
        with explain(f"checkpoint {folder}", "make room and --resume: the last complete one is intact"), \
                complete_folder(folder) as temporary:
            once = dict([*model.named_parameters(), *model.named_buffers()])  # a tied head is not named again
            model.save_pretrained(temporary, state_dict={n: w for n, w in weights.items() if n in once})
            run.tokenizer.save_pretrained(temporary)
            torch.save(moments, temporary / "optimizer.pt")  # no *.safetensors: not weights
        for old in checkpoints(run.config.output_dir)[:-run.config.keep]:
            shutil.rmtree(old, ignore_errors=True)
    sum_over_ranks()

def resume(run, folder):  # the weights are loaded already
    run.step = int(folder.name[-6:])
    path = Path(run.config.output_dir, "metrics.jsonl")
    with explain(f"checkpoint {folder}", "remove this folder to continue the checkpoint before it"):
        moments = torch.load(folder / "optimizer.pt", weights_only=True, mmap=True)
        if moments:
            set_optimizer_state_dict(run.trained, run.optimizer, moments, options=STATE)
    if RANK == 0:
        with explain(path, "it must be the log of the run to continue"):
            rows = [row for row in read_log(run.config.output_dir) if row["step"] <= run.step]
            temporary = Path(f"{path}.partial")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            temporary.replace(path)
    sum_over_ranks()

# --- The tiny pair: a teacher and a student made in seconds -------------------------------------------------
def tiny_tokenizer():  # one token a character
    vocab = {token: i for i, token in enumerate([*"0123456789+,=", "<pad>", "<eos>", "<unk>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>")

def tiny_rows(rng, count, digits, mixture):
    """The running sum mod 10 ("+") or maximum (",") of digits: an early slip poisons what follows."""
    for domain in rng.choice(list(mixture), count, p=list(mixture.values())).tolist():
        numbers = rng.integers(0, 10, digits)
        answer = np.cumsum(numbers) % 10 if domain == "+" else np.maximum.accumulate(numbers)
        prompt = "".join(map(str, numbers)) + domain + "="
        yield dict(prompt=prompt, answer="".join(map(str, answer)), group=domain)

def pretrain(name, shape, domains, target_loss, tiny, seed):  # until the smoothed loss is low
    torch.manual_seed(seed)
    rng, tokenizer = default_rng((seed, PRETRAIN, *name.encode())), tiny_tokenizer()
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), tiny["pretrain_lr"], weight_decay=0.0, fused=True)
    for step in progress(tiny["pretrain_steps"], name):
        rows = tiny_rows(rng, 128, tiny["digits"], dict.fromkeys(domains, 1 / len(domains)))
        texts = [row["prompt"] + row["answer"] + "<eos>" for row in rows]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # [128, 2 digits + 3]
        labels = ids.clone()
        labels[:, :tiny["digits"] + 2] = -100  # the prompt is not learned
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        smooth = 0.8 * smooth + 0.2 * loss.item() if step else loss.item()
        if smooth < target_loss:
            break
    note(f"{name}: {model.num_parameters():,} parameters, loss {smooth:.3f} after {step + 1} steps",
         smooth >= target_loss and f"it was to reach {target_loss}: it has not learned; try another seed")
    return model

def make_tiny(config):  # once for an output folder. -> the config of a run on them
    folder = Path(config.output_dir, f"tiny-{config.task}-{config.seed}")
    torch.set_num_threads(1)  # on all ranks: two are slower for so small a pair
    with explain(f"task {config.task!r}", "mend tiny in its JSON file, or choose another --output-dir"):
        tiny = config.tiny | config.tiny["tasks"][config.task]  # a task's own student wins
        if RANK == 0 and not folder.exists():
            with complete_folder(folder) as temporary:
                write_tiny(temporary, tiny, config.seed)
    sum_over_ranks()
    teachers = [f"{name}={folder}/{name}" for name in tiny["models"] if name != "student"]
    return dataclasses.replace(config, tiny=None, teacher=teachers, student=f"{folder}/student",
                               prompts=f"{folder}/prompts.jsonl", eval_prompts=f"{folder}/eval_prompts.jsonl")

def write_tiny(folder, tiny, seed):
    for name, domains in tiny["models"].items():  # each is trained on its domains
        kind = name if name == "student" else "teacher"
        model = pretrain(name, tiny[kind], domains, tiny[kind + "_loss"], tiny, seed)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rng, mixture = default_rng((seed, ORDER)), tiny["mixture"]  # {domain: share}
    even = dict.fromkeys(mixture, 1 / len(mixture))
    for name, count, shares in (("prompts", 4096, mixture), ("eval_prompts", 512, even)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for row in tiny_rows(rng, count, tiny["digits"], shares):
                file.write(json.dumps(row | {"teacher": tiny["graded_by"][row["group"]]}) + "\n")

# --- The command --------------------------------------------------------------------------------------------
def on_signal(number, frame):  # the run stops after its step
    STOP.set()  # a second Ctrl-C ends it at once; a second SIGTERM does not, since launchers send it twice
    signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

def set_up(config):
    warnings.simplefilter("ignore")
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans 23 to 37 ms for every new length: for every token
    if WORLD_SIZE > 1:  # half a day: longer than any rank has to wait for the longest rollouts of another
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))
    STOP.clear()
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if not config.output_dir:
        now = sum_over_ranks(torch.tensor(0.0 if RANK else time.time(), dtype=torch.float64)).item()
        config.output_dir = time.strftime("runs/%Y%m%d-%H%M%S", time.localtime(now))

def fail(message):  # one line on what is wrong, under torchrun also where it looks for the root cause
    message = visible(" ".join(message.split())[:900])
    if RANK:  # if the fault is everybody's, rank 0 says so and torchrun ends the others meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))

def main(argv=None):
    """The command. Status 0; 130 if told to stop; 2 after a user's mistake, 1 and a traceback after ours."""
    status = 2
    try:
        config = parse_config(argv)
        set_up(config)
        status = 0 if train(make_tiny(config) if config.tiny else config) else 130
        sum_over_ranks()
    except UserError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail("out of GPU memory; see the README for what to lower, such as --micro-batch-tokens")
    except Exception as error:
        status = 1
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}; complete checkpoints are intact")
    if WORLD_SIZE > 1:  # an orderly exit would wait for the other ranks, and Gloo's teardown may abort
        sys.stdout.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)

if __name__ == "__main__":
    main()
