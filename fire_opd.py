"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): on-policy distillation in one file.

The student writes responses, the teacher grades each of their tokens, and the student is moved
towards the teacher. FiRe-OPD adds two steps. Filter drops the trajectories that the teacher finds
least likely. Reweight then gives more weight to the remaining tokens on which the teacher is sure
and the student is not. The parts of one step, with the function for each (pi_S: student,
pi_T: teacher, H: entropy of the next token):

  1. rollout: responses y ~ pi_S(.|x) = softmax(logits / temperature), and H_S,t of each token
  2. grade: log pi_T(y_t) and H_T,t of each token
  3. filter_trajectories: s = mean_t log pi_T(y_t); keep s >= the 20 % quantile of the step
  4. token_weights: w_t = (1 + alpha (1 - H_T,t / max H_T)) (1 + beta H_S,t / max H_S), divided by
     its mean; maximum and mean are those of the trajectory
  5. policy_loss: the policy gradient with advantages w_t A_t, where
     token_advantages: A_t = log pi_T(y_t) - log pi_S(y_t)
  6. update: the gradient summed over micro-batches and ranks, and one step of AdamW

`train_step` puts these together and `train` is the loop around it. The method ends there, at a
marked line. The rest is plumbing: fast decoding, flags, metrics, prompts, models, files.

    python fire_opd.py           # the tiny pair of tiny_config.json, no download, about a minute
    python fire_opd.py --teacher T --student S --prompts P.jsonl                 # real models
    torchrun --nproc-per-node 8 fire_opd.py --teacher T --student S --prompts P.jsonl
    python fire_opd.py --filter-percentile 0 --alpha 0 --beta 0                  # plain OPD

In a notebook, where you can replace the functions of 3. to 5. (fire_opd.token_weights = mine)
between steps:

    import fire_opd
    config = fire_opd.parse_config(["--steps", "5"])
    fire_opd.start_ranks()
    run = fire_opd.load_run(config)  # once, as it takes the output folder
    rollouts, metrics = fire_opd.train_step(run)

Memory per GPU: 18 bytes per student parameter (4 for weights, 4 for gradients, 8 for AdamW's
moments, 2 for a bfloat16 copy) and 2 per teacher parameter. --shard divides all but the copy by the
number of GPUs. Add the cache of the rollouts or the activations of an update, whichever is larger.

Left out on purpose: a reward and a critic, credit for later tokens (A_t is about y_t alone), a KL
penalty, several updates per rollout, full-vocabulary divergences, learning-rate schedules.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from numpy.random import default_rng
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

# --- Settings: batch_size is the flag --batch-size, and a key of the --config file --------------

def setting(default, help):
    """A field of Config, with its default and its --help text, in which %% is a percent sign."""
    return field(default=default, metadata={"help": help})

@dataclass
class Config:
    """The settings of a run. The defaults are the method's; sizes are for one GPU."""
    filter_percentile: float = setting(20.0, "the filter drops this share of the rollouts, in %%")
    filter_by: Literal["likelihood", "random"] = setting(
        "likelihood", "random: a control that drops the same share at random")
    alpha: float = setting(1.0, "strength of teacher confidence in the weights")
    beta: float = setting(1.0, "strength of student confusion in the weights")
    token_weights: Literal["soft", "hard"] = setting(
        "soft", "hard: a control that trains on only the heavier half of each rollout")
    loss_agg: Literal["token-mean", "seq-mean"] = setting(
        "token-mean", "mean over kept tokens, or over the means of kept rollouts")
    temperature: float = setting(1.0, "softmax temperature of both models, in sampling and scoring")
    batch_size: int = setting(64, "prompts per step, over all ranks, with one rollout each")
    max_new_tokens: int = setting(1024, "longest response")
    lr: float = setting(1e-6, "constant learning rate of AdamW")
    weight_decay: float = setting(0.01, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    steps: int = setting(100, "steps of training; 0 only evaluates")
    seed: int = setting(0, "seeds the order of the prompts, sampling and the tiny pair")
    teacher: list[str] = field(default_factory=list, metadata={
        "help": "checkpoint folder or hub name; with several teachers NAME=PATH for each"})
    student: str = setting("", "checkpoint folder or hub name")
    prompts: str = setting("", "JSON Lines: prompt or messages; optional answer, teacher, domain")
    eval_prompts: str = setting("", "held-out prompts in the same format")
    enable_thinking: bool = setting(False, "passed on to the chat template")
    max_prompt_tokens: int = setting(1024, "longer prompts are dropped")
    rollout_batch_size: int = setting(64, "rows generated at once on a rank")
    micro_batch_tokens: int = setting(8192, "tokens per forward pass in grading and update")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    compile: bool = setting(False, "compile grading and update: slow at first")
    shard: bool = setting(False, "FSDP2: shard student, optimizer and teachers over the ranks")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on a GPU")
    output_dir: str = setting("", "new folder for metrics and checkpoints; default in runs/")
    resume: bool = setting(False, "continue the run in --output-dir; if there is none, start it")
    eval_every: int = setting(0, "steps between evaluations; 0: before and after the run")
    save_every: int = setting(
        20, "steps between checkpoints, of which the newest two are kept; 0: only at the end")
    config: str = setting("", "JSON file of settings; flags override it")
    task: str = setting("foreign", "the tiny pair's task, one of those in tiny_config.json")
    tiny: dict = field(default_factory=dict, init=False)  # no flag: how the tiny pair is made

# --- The arithmetic of the method: functions of tensors, without models --------------------------

def upcast(x):
    """At least float32, as bfloat16 is too coarse for a softmax. float64 is left as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def is_eos(tokens, eos_ids):
    """Which tokens end a response; eos_ids is a set of ids. tokens [...] -> bool [...]"""
    return torch.isin(tokens, tokens.new_tensor(sorted(eos_ids)))

def mask_responses(tokens, eos_ids):
    """True up to and including the first end of sequence. tokens [B, T] -> bool [B, T]

    The mask goes by position: where EOS and padding have the same id, `tokens != pad` would mask
    the EOS too, and the student would never learn to stop.
    """
    ends = is_eos(tokens, eos_ids).long()
    ends_before = ends.cumsum(1) - ends  # how many EOS stand before each token
    return ends_before == 0

def trajectory_scores(teacher_log_probs, response_mask):
    """s = mean_t log pi_T(y_t): how likely the teacher finds each trajectory, in nats per token.

    teacher_log_probs, response_mask [B, T] -> scores [B]. A row without a response scores minus
    infinity and is never kept. Its sum would be 0, the best score of all.
    """
    mask = response_mask.bool()
    lengths = mask.sum(1)  # [B]
    total = upcast(teacher_log_probs).masked_fill(~mask, 0).sum(1)  # [B]
    scores = total / lengths  # 0 / 0 is NaN
    return scores.masked_fill(lengths == 0, -torch.inf)

def filter_trajectories(scores, percentile):
    """Filter: keep the trajectories whose score is at least the `percentile` quantile.

    scores [B] of the WHOLE step -> keep [B] bool. Not of a micro-batch: a single row would be its
    own quantile and always be kept. The quantile is that of all finite scores, interpolated
    linearly. Scores equal to it are kept; NaN and infinite scores never are.
    """
    scores = scores.double()
    finite = scores.isfinite()
    if not finite.any():
        return finite  # nothing to keep
    threshold = scores[finite].quantile(percentile / 100)
    return finite & (scores >= threshold - 1e-9)  # it may be rounded to just above a score

def relative_entropy(entropy, mask):
    """H / max H of each row, in [0, 1]; 0 where all entropies are 0. [B, T] -> [B, T]"""
    entropy = upcast(entropy.detach()).masked_fill(~mask, 0)
    largest = entropy.amax(1, keepdim=True)
    return entropy / largest.clamp(min=1e-30)  # 0 / 0 would be NaN

def token_weights(teacher_entropy, student_entropy, response_mask, alpha=1.0, beta=1.0):
    """Reweight: w_t = (1 + alpha c_t) (1 + beta u_t), divided by its mean over the trajectory.

    Teacher confidence c_t = 1 - H_T,t / max H_T: a teacher that hesitates teaches little.
    Student confusion  u_t = H_S,t / max H_S: where the student hesitates it has the most to learn.
    Entropies (nats; anything off the mask) and mask [B, T] -> weights [B, T], zero off the mask,
    without gradient.
    Maximum and mean are those of each row; in the released code they are those of the micro-batch.
    """
    mask = response_mask.bool()
    confidence = 1 - relative_entropy(teacher_entropy, mask)  # [B, T]
    confusion = relative_entropy(student_entropy, mask)  # [B, T]
    weights = (1 + alpha * confidence) * (1 + beta * confusion)
    weights = weights.masked_fill(~mask, 0)
    # Mean 1, so that the update is about as large as in plain distillation.
    total = weights.sum(1, keepdim=True).clamp(min=1e-12)  # else 0 / 0 in an empty row
    return weights * mask.sum(1, keepdim=True) / total

def token_advantages(teacher_log_probs, student_log_probs):
    """A_t = log pi_T(y_t) - log pi_S(y_t), element by element: how much the teacher prefers y_t.

    -A_t is the one-sample (k1) estimate of the reverse KL(pi_S || pi_T). To minimize another
    divergence E_S[f(u)], u = pi_T / pi_S, return u f'(u) - f(u), with a linear term in f such that
    f'(1) = 0. Forward KL: f(u) = u log u - u + 1 gives u - 1, in code
    (teacher_log_probs - student_log_probs).expm1(). It is right because the gradient of E_S[f(u)]
    is E_S[(f(u) - u f'(u)) grad log pi_S].
    """
    return teacher_log_probs - student_log_probs

def policy_loss(log_probs, teacher_log_probs, weights, mask, divisor):
    """-(1/divisor) sum over mask of r_t w_t A_t, with r_t = pi_S / stop_gradient(pi_S) -> scalar

    r_t is 1 and has the gradient of log pi_S. So the gradient is that of REINFORCE,
    -(1/divisor) sum w A grad log pi_S, and the value estimates the weighted reverse KL. With the
    advantages of another divergence the value means nothing. Clipping r_t would change nothing,
    since each rollout serves one update.
    All tensors [b, T]. divisor: how many tokens the WHOLE step keeps (with seq-mean: how many
    rollouts), because the gradients of micro-batches are summed.
    """
    mask = mask.bool()
    log_probs, weights = log_probs[mask], weights[mask]  # [n], the valid tokens
    advantages = token_advantages(teacher_log_probs[mask], log_probs)
    ratio = (log_probs - log_probs.detach()).exp()  # 1, with the gradient of log pi_S
    return -(ratio * (weights * advantages).detach()).sum() / divisor

def chunk_log_probs(hidden, lm_head_weight, bias, targets, with_entropy):
    """log pi(target) and H of one chunk. [n, D], [V, D], [V], [n] -> [n], [n]. Under autocast the
    logits are bfloat16, an error of a few hundredths of a nat; the softmax is float32."""
    # Keep the `.T`. Autocast keeps the bfloat16 copy of a parameter, in which the gradients of all
    # chunks would add up. A view it casts anew in each chunk, and the sum is float32.
    logits = torch.addmm(bias, hidden, lm_head_weight.T)  # hidden @ W.T + bias, [n, V]
    log_p = upcast(logits).log_softmax(1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = torch.zeros_like(log_probs)
    if with_entropy:
        entropy = torch.special.entr(log_p.detach().exp()).sum(1)  # entr(p) = -p log p
    return log_probs, entropy

def token_log_probs_and_entropy(hidden, lm_head_weight, targets, temperature=1.0, chunk=None,
                                bias=None, with_entropy=True, chunk_function=chunk_log_probs):
    """log pi(target_n) and H_n of pi = softmax((hidden W^T + bias) / temperature), by chunks.

    hidden [N, D], lm_head_weight [V, D], bias [V], targets [N] -> log_probs [N], differentiable,
    and entropy [N], which is not. With V = 152 k the logits of 8,192 tokens take 5 GB, and their
    gradient several times that. So only one chunk has logits at a time, and the backward pass
    computes them again. Small chunks would be slow, as each reads and writes all of W's gradient.
    chunk_function: chunk_log_probs, or its compiled version.
    """
    if chunk is None:
        chunk = max(128, hidden.shape[1])  # of D rows: its logits are as large as W's gradient
    if bias is None:
        bias = hidden.new_zeros(len(lm_head_weight))
    log_probs, entropy = [], []
    hidden = hidden / temperature  # (hidden W^T + bias) / temperature without another [n, V]
    bias = bias / temperature
    for h, y in zip(hidden.split(chunk), targets.split(chunk)):
        p, e = checkpoint(
            chunk_function, h, lm_head_weight, bias, y, with_entropy,
            use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        log_probs.append(p)
        entropy.append(e)
    return torch.cat(log_probs), torch.cat(entropy)

def sample_tokens(logits, uniforms, temperature=1.0):
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u.

    logits [B, V], uniforms [B] in [0, 1) -> tokens, log_probs, entropy, all [B]. The cumulative sum
    is in float64: in float32, rounding over 152 k tokens would distort the tail. Whoever changes
    the distribution here (top-p) must change it in `chunk_log_probs`, too.
    """
    probs = (upcast(logits) / temperature).softmax(1)
    cdf = probs.cumsum(1, dtype=torch.float64)  # [B, V]
    points = uniforms.double() * cdf[:, -1]  # below the end, as u is below 1
    tokens = torch.searchsorted(cdf, points[:, None], right=True)  # never one of probability 0
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # [B, 1]; a valid id even if logits are NaN
    log_probs = probs.gather(1, tokens)[:, 0].log()
    entropy = torch.special.entr(probs).sum(1)
    return tokens[:, 0], log_probs, entropy

# What random numbers are for, as part of their key; 4 is free. Changing these changes every run.
SAMPLE, EVALUATE, ORDER, FILTER, PRETRAIN = 0, 1, 2, 3, 5

def stateless_uniforms(key, rows, width):
    """Uniforms in [0, 1), float64 [b, width]. Those of row i depend only on i and on key, which is
    (seed, purpose, step), or (seed, purpose) if all steps share them. So, except for rounding,
    neither the number of ranks nor resuming changes a run, and no generator has to be restored."""
    drawn = [default_rng((*key, i)).random(width) for i in rows]
    return torch.tensor(np.array(drawn))

# --- Ranks: torchrun starts one process (a rank) per GPU; each takes its share of the rows -------

# Ranks wait for each other in every collective, so all of them must call the same ones in the same
# order. That is why the tables of a step are the same on every rank, and why each rank gets as many
# micro-batches as the others: with --shard every forward pass is a collective, too.

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def sum_over_ranks(table):
    """Sum a CPU tensor over the ranks, in place. If each rank has filled its own rows of a table of
    zeros, the sum is the full table, identical on every rank."""
    if WORLD_SIZE > 1:
        dist.all_reduce(table)
    return table

def barrier():
    """Wait for all ranks."""
    sum_over_ranks(torch.zeros(1))

def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    return box[0]

# --- Policies: a causal language model, teacher or student, as the method sees it ----------------

class Policy(nn.Module):
    """`forward` grades given responses, `sample` writes new ones, both at the same temperature.
    eos_ids and vocabulary are sets of ids; only those of the vocabulary are ever sampled."""
    segment = 64  # after this many tokens, the rows that have ended leave the batch

    def __init__(self, model, eos_ids, vocabulary, config):
        super().__init__()
        self.model = model
        self.eos_ids = eos_ids
        self.temperature = config.temperature
        self.bf16 = compute_dtype(config) == torch.bfloat16  # autocast matrix products
        self.use_cuda_graph = DEVICE == "cuda" and not config.shard  # with FSDP it is untested
        # Some rows of the head are padding, or tokens that another model lacks. A bias of minus
        # infinity excludes them. Cutting them off would leave an odd V, slow on a GPU.
        head = model.get_output_embeddings().weight  # [V, D]
        bias = torch.full(head.shape[:1], -torch.inf)
        bias[sorted(vocabulary)] = 0
        self.register_buffer("vocabulary_bias", bias, persistent=False)  # [V]
        if config.gradient_checkpointing:  # transformers' own would need training mode
            for block in blocks(model):
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        self.chunk_function = chunk_log_probs
        if config.compile:
            self.chunk_function = torch.compile(chunk_log_probs, dynamic=True)
            for block in blocks(model):
                block.compile(dynamic=True)

    def forward(self, prompts, tokens, mask):
        """log pi(y_t) and H_t of responses to b prompts, lists of ids. tokens, mask [b, T]
        -> two tables [b, T], 0 off the mask. With gradients H_t is left 0: no update needs it.
        Tables, also those of `sample`, are on the CPU."""
        ids, is_response = [], []
        for prompt, row, valid in zip(prompts, tokens, mask):
            row_ids = torch.tensor(prompt + row[valid].tolist())
            ids.append(row_ids)
            is_response.append(torch.arange(len(row_ids)) >= len(prompt))
        if not prompts:  # a rank without rows must still join in, with two tokens of no response
            ids.append(torch.tensor([0, 0]))
            is_response.append(torch.tensor([False, False]))
        # Padding is on the right, where a causal model never looks: no attention mask.
        ids = pad_sequence(ids, batch_first=True).to(DEVICE)  # [b, L]
        is_response = pad_sequence(is_response, batch_first=True).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            predicts = is_response[:, 1:]  # [b, L - 1], as position t - 1 predicts token t
            hidden = hidden[:, :-1][predicts]  # [n, D]
            targets = ids[:, 1:][predicts]  # [n]
            log_probs, entropy = token_log_probs_and_entropy(  # [n]
                hidden, self.model.get_output_embeddings().weight, targets, self.temperature,
                bias=self.vocabulary_bias, with_entropy=not torch.is_grad_enabled(),
                chunk_function=self.chunk_function)
        mask = mask.cpu()  # FSDP moves arguments to the GPU
        zeros = torch.zeros(mask.shape)
        # The n values go back in the order they came. Gradients pass through .cpu(), too.
        return (zeros.masked_scatter(mask, log_probs.cpu()),
                zeros.masked_scatter(mask, entropy.cpu()))

    @torch.no_grad()
    def sample(self, prompts, uniforms):
        """One response to each of b prompts, lists of ids. uniforms [b, T] in [0, 1)
        -> tokens, log_probs, entropy, all [b, T], undefined after a row's EOS"""
        T = uniforms.shape[1]
        # One autocast around all of it casts the weights once, not for each token.
        autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16)
        # Eager, even with --compile: with a cache, blocks differ in their layer_idx, and each would
        # be compiled on its own.
        with autocast, torch.compiler.set_stance("force_eager"):
            # Feed in the prompts and draw the first token of each row. In each pass of the loop,
            # when `start` tokens are drawn, the unfinished rows get up to `segment` more.
            # decoder.rows: which of the b rows the last pass wrote.
            decoder = Decoder(self, prompts, uniforms)
            for start in progress(f"{len(prompts)} rollouts", range(1, T, self.segment)):
                # Rows that ended leave, so that the batch does not wait for its longest row.
                drawn = decoder.tokens[decoder.rows, :start]  # [n, start]
                ended = is_eos(drawn, self.eos_ids).any(1)
                if ended.all():
                    break
                count = min(self.segment, T - start)
                decoder.keep_rows(~ended, room=count)
                decoder.decode(count)
        tables = (decoder.tokens, decoder.log_probs, decoder.entropy)
        return [table.cpu() for table in tables]

# --- One step: rollout, grade, filter, reweight, update ------------------------------------------

@dataclass
class Prompt:
    """A line of the prompt file."""
    ids: list  # token ids from the student's chat template; the teacher sees the same
    answer: str | None  # None if it is not known
    teacher: str  # the name of the teacher that grades it
    domain: str  # evaluations are also broken down by domain

@dataclass
class Rollouts:
    """The trajectories of one step, as tables on the CPU that are the same on every rank. Column t
    belongs to the t-th token of the response. Values off the mask are undefined."""
    prompts: list  # B prompts
    total_lengths: list  # B numbers of tokens, prompt and response
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, the response mask
    student_log_probs: Tensor  # [B, T] log pi_S(y_t), as sampled; the loss has its own
    student_entropy: Tensor  # [B, T] H_S,t, as sampled
    # Filled in by train_step, in this order:
    teacher_log_probs: Tensor = None  # [B, T] log pi_T(y_t)
    teacher_entropy: Tensor = None  # [B, T] H_T,t
    scores: Tensor = None  # [B]
    keep: Tensor = None  # [B] bool
    weights: Tensor = None  # [B, T], zero in dropped rows

    def select(self, rows):
        """What a policy scores: the ids of these rows' prompts, their tokens and their mask."""
        ids = [self.prompts[i].ids for i in rows]
        return ids, self.tokens[rows], self.mask[rows]

@dataclass
class Run:
    """The state of a run, built by `load_run`. `run.config.x` is the setting --x."""
    config: Config
    tokenizer: object
    prompts: list  # of Prompt
    eval_prompts: list
    student: Policy
    trained: nn.Module  # the student, wrapped in DDP on several ranks without --shard
    student_folder: Path  # where it came from
    optimizer: torch.optim.Optimizer
    teachers: dict = field(default_factory=dict)  # name -> Policy
    step: int = 0  # steps done
    log: list = field(default_factory=list)  # the rows of metrics.jsonl
    seconds: dict = field(default_factory=dict)  # phase -> how long it took

def train_step(run):
    """One step of FiRe-OPD. -> Rollouts, metrics"""
    config = run.config
    # 1. the student writes
    r = rollout(run, step_prompts(run), (config.seed, SAMPLE, run.step))
    # 2. the teacher grades
    r.teacher_log_probs, r.teacher_entropy = grade(run, r)  # [B, T]
    # 3. filter
    r.scores = trajectory_scores(r.teacher_log_probs, r.mask)  # [B]
    ranked_by = r.scores
    if config.filter_by == "random":
        ranked_by = random_scores(run, r.scores)
    r.keep = filter_trajectories(ranked_by, config.filter_percentile)  # [B]
    # 4. reweight
    kept = r.mask & r.keep[:, None]  # [B, T]
    r.weights = token_weights(  # [B, T]
        r.teacher_entropy, r.student_entropy, kept, config.alpha, config.beta)
    if config.token_weights == "hard":
        r.weights = hard_weights(r.weights, kept)
    # 5. loss, 6. update
    metrics = update(run, r)
    run.step += 1
    return r, metrics | measure_step(run, r)

def timed(phase):
    """A decorator that notes in `run.seconds` how long a phase took."""
    @functools.wraps(phase)
    def timed_phase(run, *args, **kwargs):
        start = time.perf_counter()
        result = phase(run, *args, **kwargs)  # results on the CPU: the GPU is done, AdamW aside
        run.seconds[phase.__name__] = time.perf_counter() - start
        return result
    return timed_phase

def step_prompts(run):
    """The prompts of this step. Each epoch is a fresh permutation of all of them."""
    n, size = len(run.prompts), run.config.batch_size
    chosen = []
    for i in range(size):
        epoch, place = divmod(run.step * size + i, n)  # counted from the run's start
        if place == 0 or i == 0:  # a new epoch, or the first prompt of this step
            order = default_rng((run.config.seed, ORDER, epoch)).permutation(n)
        chosen.append(run.prompts[order[place]])
    return chosen

@timed
def rollout(run, prompts, key):
    """Step 1. The student writes one response to each prompt, each rank its share. -> Rollouts
    key: see stateless_uniforms."""
    B, T = len(prompts), run.config.max_new_tokens
    tokens = torch.zeros(B, T, dtype=torch.long)
    log_probs = torch.zeros(B, T)
    entropy = torch.zeros(B, T)
    share = list(range(RANK, B, WORLD_SIZE))
    for start in range(0, len(share), run.config.rollout_batch_size):
        rows = share[start:start + run.config.rollout_batch_size]
        ids = [prompts[i].ids for i in rows]
        drawn = run.student.sample(ids, stateless_uniforms(key, rows, T))
        tokens[rows], log_probs[rows], entropy[rows] = drawn
    for table in (tokens, log_probs, entropy):
        sum_over_ranks(table)
    mask = mask_responses(tokens, run.student.eos_ids)
    total_lengths = []
    for prompt, length in zip(prompts, mask.sum(1).tolist()):
        total_lengths.append(len(prompt.ids) + length)
    return Rollouts(prompts, total_lengths, tokens, mask, log_probs, entropy)

def micro_batches(rows, lengths, budget):
    """This rank's share of `rows`, in lists of at most `budget` tokens with padding (or one row).

    Sorted by length, for little padding, and dealt to the ranks like cards, so that all ranks get
    the same number of lists, the last one perhaps empty. Of rows of 9, 5, 4, 2 and 1 tokens with a
    budget of 10, rank 0 of 2 gets [9] and [4, 1], and rank 1 gets [5] and [2].
    """
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    batches = []
    while rows:
        count = max(1, budget // lengths[rows[0]])  # rows for each rank; rows[0] is the longest
        dealt, rows = rows[:count * WORLD_SIZE], rows[count * WORLD_SIZE:]
        batches.append(dealt[RANK::WORLD_SIZE])
    return batches

@timed
@torch.no_grad()
def grade(run, rollouts):
    """Step 2. Each row's own teacher grades its tokens. -> log pi_T(y_t) and H_T,t, both [B, T]"""
    tables = torch.zeros(2, *rollouts.mask.shape)  # each rank fills its share
    for name, teacher in run.teachers.items():
        rows = [i for i, prompt in enumerate(rollouts.prompts) if prompt.teacher == name]
        for micro in micro_batches(rows, rollouts.total_lengths, run.config.micro_batch_tokens):
            tables[0, micro], tables[1, micro] = teacher(*rollouts.select(micro))  # [b, T]
    return sum_over_ranks(tables)

@timed
def update(run, rollouts):
    """Steps 5 and 6. Only kept trajectories go through the student. -> metrics"""
    config = run.config
    rows = rollouts.keep.nonzero()[:, 0].tolist()
    weights = rollouts.weights
    divisor = int(rollouts.mask[rows].sum())  # kept tokens
    if config.loss_agg == "seq-mean":  # the mean over trajectories of their own means
        weights = weights / rollouts.mask.sum(1, keepdim=True)
        divisor = len(rows)
    loss = torch.zeros(())
    micros = micro_batches(rows, rollouts.total_lengths, config.micro_batch_tokens)
    for i, micro in enumerate(micros):
        # DDP exchanges gradients in the last backward alone. Without DDP nobody reads this.
        run.trained.require_backward_grad_sync = i == len(micros) - 1
        # A_t uses log pi_S of this forward pass, not the sampler's: the two round differently.
        log_probs, _ = run.trained(*rollouts.select(micro))  # [b, T]
        part = policy_loss(log_probs, rollouts.teacher_log_probs[micro], weights[micro],
                           rollouts.mask[micro], divisor)
        (part * WORLD_SIZE).backward()  # DDP and FSDP take the mean over ranks, we want the sum
        loss += part.detach()
    loss = sum_over_ranks(loss).item()
    norm = nn.utils.clip_grad_norm_(run.student.parameters(), config.max_grad_norm)
    if hasattr(norm, "full_tensor"):  # under FSDP: the norm over all shards
        norm = norm.full_tensor()
    norm = norm.item()
    skipped = not rows or not math.isfinite(loss + norm)  # nothing kept, or a NaN somewhere
    if not skipped:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=False)  # DDP's gradients are views of its buckets
    return {"loss": loss, "grad_norm": norm, "skipped_updates": int(skipped)}

# --- The run -------------------------------------------------------------------------------------

def train(config):
    """A whole run, or with --resume the rest of one. It may be killed at any time: --resume repeats
    the work since the newest checkpoint, with the same prompts and the same random numbers."""
    run = load_run(config)
    if run.step == 0:
        evaluate(run)
    while run.step < config.steps:
        rollouts, metrics = train_step(run)
        report_step(run, rollouts, metrics)
        if due(run, config.eval_every):
            evaluate(run)
        if due(run, config.save_every):
            save_checkpoint(run)  # with the log, so after the evaluation
        write_report(run, rollouts)
    summarize(run)

def due(run, every):
    """Whether this step is the last, or a multiple of `every`; 0: only the last."""
    multiple = every > 0 and run.step % every == 0
    return multiple or run.step == run.config.steps

# === The method ends here; plumbing follows ======================================================

# --- Two controls for experiments: a random filter, and hard weights -----------------------------

def random_scores(run, scores):
    """Random numbers in place of the scores, NaN where they are not finite. [B] -> [B]"""
    key = (run.config.seed, FILTER, run.step)
    noise = stateless_uniforms(key, [0], len(scores))[0]
    return noise.masked_fill(~scores.isfinite(), math.nan)

def hard_weights(weights, response_mask):
    """Equal weights for the heavier half of each row's tokens, 0 for the others; their mean is 1.
    weights, response_mask [B, T] -> [B, T], zero off the mask."""
    lengths = response_mask.sum(1, keepdim=True)  # [B, 1]
    half = (lengths + 1) // 2
    order = weights.argsort(dim=1, descending=True, stable=True)  # off the mask, 0, comes last
    place = order.argsort(dim=1)  # [B, T], the rank of each token: 0 is the heaviest
    return (place < half) * lengths / half.clamp(min=1)

# --- Fast decoding: a cache with free slots, and CUDA graphs -------------------------------------

class CastStaticLayer(StaticLayer):
    """Keys and values [n, heads, L, d] of a layer with free slots, into which `update` writes those
    of new tokens. Appending, as DynamicLayer does, would copy everything for every token.
    StaticLayer counts the filled slots in a tensor, so they are counted in a CUDA graph, too."""

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)  # under autocast rotary embeddings make them float32
        return super().update(keys, values)

def suits_static_cache(model, cache):
    """Whether free slots and CUDA graphs suit a model; others keep transformers' dynamic cache."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (rope.get("rope_type") in ("default", "linear", "llama3", "yarn")  # ignores other rows
            and all(type(layer) is DynamicLayer for layer in cache.layers)  # attends to all tokens
            and model.config._attn_implementation == "sdpa"  # takes four-dimensional masks
            and not getattr(config, "alibi", False))

class Decoder:
    """The responses to b prompts, drawn token by token; n of them are still being written. The L
    slots of the cache, in each row:

        padding | prompt | response | free
                        ^ width    ^ slot

    The prompts end before `width`; `slot` is that of the last token fed in. The newest token, which
    was drawn from it, is not in the cache yet. So with prompts of 2 and 4 tokens width is 4, and at
    first slot is 3 and the newest token is column 0 of the response; after `next_token` slot is 4
    and it is column 1.

    `next_token` changes tensors only in place, so a CUDA graph can replay it. `keep_rows` makes new
    ones.
    """

    def __init__(self, policy, prompts, uniforms):
        """Feed in the prompts, lists of ids, and draw the first token of each row."""
        self.policy = policy
        self.uniforms = uniforms.to(DEVICE)  # [b, T]
        self.tokens = torch.zeros_like(self.uniforms, dtype=torch.long)
        self.log_probs = torch.zeros_like(self.uniforms, dtype=torch.float32)
        self.entropy = torch.zeros_like(self.log_probs)
        self.rows = torch.arange(len(prompts), device=DEVICE)  # [n], which of the b they are
        ids = [torch.tensor(prompt) for prompt in prompts]
        ids = pad_sequence(ids, batch_first=True, padding_side="left").to(DEVICE)
        self.width = ids.shape[1]
        self.slots = torch.arange(self.width, device=DEVICE)  # [L], all that the cache has
        self.slot = self.slots[-1:].clone()  # [1]
        padding = [[self.width - len(prompt)] for prompt in prompts]
        self.padding = torch.tensor(padding, device=DEVICE)  # [n, 1]
        self.cache = transformers.DynamicCache(config=policy.model.config)
        self.static = suits_static_cache(policy.model, self.cache)
        if self.static:
            self.cache.layers = [CastStaticLayer(self.width) for _ in self.cache.layers]
        self.newest = self.draw(ids, self.slots)  # [n, 1]

    def draw(self, ids, fed):
        """Feed in ids, into the slots `fed`, and draw the next token of each row. -> [n, 1]"""
        attention = (self.slots >= self.padding) & (self.slots <= self.slot)  # [n, L]
        if not self.static:
            attention = attention[:, :self.slot.item() + 1]  # a dynamic cache has no free slots
        elif len(fed) == 1:
            # A mask of four dimensions is used as it is. To that of the prompts, which has two,
            # transformers adds the causal part.
            attention = attention[:, None, None]
        positions = (fed - self.padding).clamp(min=0)
        output = self.policy.model(
            input_ids=ids, attention_mask=attention, position_ids=positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1] + self.policy.vocabulary_bias  # [n, V]
        column = self.slot - (self.width - 1)  # [1]; the prompt's last slot gives column 0
        uniforms = self.uniforms[self.rows, column]
        tokens, log_probs, entropy = sample_tokens(logits, uniforms, self.policy.temperature)
        self.tokens[self.rows, column] = tokens
        self.log_probs[self.rows, column] = log_probs
        self.entropy[self.rows, column] = entropy
        return tokens[:, None]

    def next_token(self):
        """Feed in the newest token of each row and draw the next."""
        self.slot.add_(1)
        self.newest.copy_(self.draw(self.newest, self.slot))

    def keep_rows(self, keep, room):
        """Continue with some of the n rows, bool [n], and make room for this many tokens."""
        self.rows = self.rows[keep]
        self.newest = self.newest[keep]
        self.padding = self.padding[keep]
        used = self.slot.item() + 1
        total = 8 * math.ceil((used + room) / 8)  # attention kernels prefer multiples of 8
        self.slots = torch.arange(total, device=DEVICE)  # [L]
        if not self.static:
            self.cache.reorder_cache(keep.nonzero()[:, 0])  # despite its name it selects these rows
            return
        for i, old in enumerate(self.cache.layers):
            self.cache.layers[i] = CastStaticLayer(total)
            self.cache.layers[i].update(old.keys[keep, :, :used], old.values[keep, :, :used])

    def decode(self, count):
        """Draw this many tokens of each row. All but the first are replays of a CUDA graph, without
        Python in between; it is a new one each time, as `keep_rows` makes new tensors."""
        self.next_token()  # also warms up what is initialized lazily, which cannot be captured
        next_token = self.next_token
        if self.policy.use_cuda_graph and self.static:
            graph = torch.cuda.CUDAGraph()
            # thread_local: CUDA calls of other threads, such as NCCL's, do not break the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.next_token()  # captured, and not run
            next_token = graph.replay
        for _ in range(count - 1):
            next_token()

# --- The command line ----------------------------------------------------------------------------

class UserError(Exception):
    """A user's mistake, which `main` shows as one line."""

@contextlib.contextmanager
def fault_of(name):
    """Report what fails in here as a fault of `name`: one line instead of a traceback."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error

def parse_config(argv):
    """Defaults, then the JSON file, then the command line. No models given: tiny_config.json."""
    parser = transformers.HfArgumentParser(
        Config, usage="fire_opd.py [--setting value ...]", allow_abbrev=False)
    config = parser.parse_args(argv)  # a first time, to find --config
    path = config.config
    if not path and not config.teacher and not config.student and not config.prompts:
        path = Path(__file__).with_name("tiny_config.json")
    # The file's settings become words of the command line, before those of argv: all are checked
    # alike, and the later ones win.
    words, tiny = [], {}
    if path:
        with fault_of(path):
            settings = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            tiny = settings.pop("tiny", {})
        for name, value in settings.items():
            if value not in (None, []):
                values = value if isinstance(value, list) else [value]
                words += ["--" + name, *map(str, values)]
    config = Config(**vars(parser.parse_args([*words, *argv])))
    config.tiny = tiny
    if sum(word.split("=")[0] == "--teacher" for word in argv) > 1:
        raise UserError("give all teachers after one --teacher")
    folder = Path(path).parent
    if config.resume and path and not config.output_dir and (folder / "metrics.jsonl").exists():
        config.output_dir = str(folder)  # --config RUN/config.json --resume: the run is RUN
    check_settings(config)
    return config

def check_settings(config):
    """Refuse what would fail late or go wrong silently. No number may be negative."""
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not 0 <= value <= 1e9:
            raise UserError(f"{name} must be between 0 and 1e9, got {value}")
    for name in ("temperature", "lr", "max_grad_norm", "batch_size", "max_new_tokens",
                 "rollout_batch_size"):
        if getattr(config, name) == 0:
            raise UserError(f"{name} must be greater than 0")
    if config.filter_percentile > 100:
        raise UserError(f"filter_percentile must be at most 100, got {config.filter_percentile}")
    if config.batch_size < WORLD_SIZE:
        raise UserError(f"batch_size must be at least {WORLD_SIZE}, a prompt for each rank")
    if config.shard and WORLD_SIZE == 1:
        raise UserError("--shard needs several ranks: start the program with torchrun")
    if config.resume and not config.output_dir:
        raise UserError("--resume needs the --output-dir of the run, or its config.json")
    if config.output_dir and os.path.exists(config.output_dir) and not config.resume:
        raise UserError(f"{config.output_dir} exists: add --resume, or change --output-dir")
    given = [config.teacher, config.student, config.prompts]
    if config.tiny and (any(given) or config.eval_prompts):
        raise UserError("the tiny pair has its own --teacher, --student, --prompts, --eval-prompts")
    if config.tiny and config.task not in config.tiny["tasks"]:
        raise UserError(f"task must be one of {list(config.tiny['tasks'])}")
    if not config.tiny and not all(given):
        raise UserError("give --teacher, --student and --prompts; or none of them, for the tiny "
                        "pair of tiny_config.json or of a changed copy of it as --config")

# --- Metrics and evaluation ----------------------------------------------------------------------

def final_answer(text):
    """The content of the last \\boxed{...}, or else the last number, or else all of the text; if
    there is ####, as in GSM8K, of what comes after it."""
    text = text.split("####")[-1]
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)  # also \boxed{\frac{1}{2}}
    # -3 or 1,234.5 or 2/3. A minus after a digit, a letter or a bracket is not a sign: 5-3 has 3.
    numbers = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    found = boxes or numbers or [text]
    answer = re.sub(r"[\s$,]", "", found[-1])
    answer = answer.rstrip(".")
    if re.fullmatch(r"-?\d+\.\d+", answer):  # 72.0 is 72
        answer = answer.rstrip("0").rstrip(".")
    return answer

def correctness(run, rollouts):
    """Which rollouts [B] end in the answer: 1 or 0, NaN where no answer is known."""
    correct = torch.full((len(rollouts.prompts),), math.nan)
    for i, prompt in enumerate(rollouts.prompts):
        if prompt.answer is not None:
            response = rollouts.tokens[i][rollouts.mask[i]]
            text = run.tokenizer.decode(response, skip_special_tokens=True)
            correct[i] = final_answer(text) == final_answer(prompt.answer)
    return correct

def averages(run, rollouts, groups):
    """Means over the tokens or trajectories of groups of rows; NaN if there are none. Evaluations
    come here too, without keep and weights. groups {suffix of the names: rows [B] bool}"""
    correct = correctness(run, rollouts)
    ends = rollouts.mask & is_eos(rollouts.tokens, run.student.eos_ids)  # [B, T]
    metrics = {}
    for suffix, rows in groups.items():
        valid = rollouts.mask & rows[:, None]  # [B, T]
        k1 = rollouts.student_log_probs - rollouts.teacher_log_probs  # [B, T]
        values = {
            "reverse_kl": k1[valid],
            "score": rollouts.scores[rows],
            "teacher_entropy": rollouts.teacher_entropy[valid],
            "student_entropy": rollouts.student_entropy[valid],
            "response_length": rollouts.mask.sum(1)[rows],
            "truncated_ratio": ~ends.any(1)[rows],
            "exact_match": correct[rows & correct.isfinite()],
        }
        for name, x in values.items():
            metrics[name + suffix] = x.float().mean().item()
    return metrics

def measure_step(run, rollouts):
    """The metrics of a step: of all rollouts, of the kept and of the dropped."""
    keep = rollouts.keep
    everything = torch.ones_like(keep)
    metrics = averages(run, rollouts, {"": everything, "_kept": keep, "_dropped": ~keep})
    metrics["keep_ratio"] = keep.float().mean().item()
    kept_scores = rollouts.scores[keep].tolist()
    metrics["filter_threshold"] = min(kept_scores, default=math.nan)  # the lowest kept score
    weights = rollouts.weights[rollouts.mask & keep[:, None]]  # [n]
    effective_size = weights.mean() ** 2 / weights.square().mean()  # 1 if all are equal
    metrics["weight_ess"] = effective_size.item()
    for phase, seconds in run.seconds.items():
        metrics["seconds_" + phase] = seconds
    metrics["tokens_per_second"] = rollouts.mask.sum().item() / sum(run.seconds.values())
    if DEVICE == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics

def evaluate(run):
    """One response to each held-out prompt, from the same random numbers in every evaluation."""
    if not run.eval_prompts:
        return
    r = rollout(run, run.eval_prompts, (run.config.seed, EVALUATE))
    r.teacher_log_probs, r.teacher_entropy = grade(run, r)
    r.scores = trajectory_scores(r.teacher_log_probs, r.mask)
    groups = {"": torch.ones(len(r.prompts), dtype=torch.bool)}
    for domain in sorted({prompt.domain for prompt in r.prompts} - {""}):
        in_domain = [prompt.domain == domain for prompt in r.prompts]
        groups["/" + domain] = torch.tensor(in_domain)
    row = {"eval/" + name: x for name, x in averages(run, r, groups).items()}
    for suffix in groups:
        print0(f"step {run.step}: eval{suffix}: reverse_kl {row['eval/reverse_kl' + suffix]:.3f}, "
               f"exact_match {row['eval/exact_match' + suffix]:.3f}")
    log(run, row)

# --- The screen, the log and the report ----------------------------------------------------------

def print0(text):
    """A line on the screen, from rank 0."""
    if RANK == 0:
        print(text, flush=True)

def progress(label, iterable):
    """A progress bar, on rank 0 and (disable=None) at a terminal only."""
    return tqdm(iterable, label, leave=False, disable=None if RANK == 0 else True)

def log(run, metrics):
    """Append a row to the log and to metrics.jsonl. JSON has no NaN: it becomes null."""
    row = {"step": run.step}
    for name, x in metrics.items():
        row[name] = x if math.isfinite(x) else None
    run.log.append(row)
    if RANK == 0:
        with open(Path(run.config.output_dir, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\n")

def examples(run, rollouts, count):
    """The first rollouts that were kept, and the first that were dropped.
    -> a list of (row, verdict, prompt)"""
    chosen = []
    for word, rows in (("kept", rollouts.keep), ("DROPPED", ~rollouts.keep)):
        for i in rows.nonzero()[:count, 0].tolist():
            prompt = run.tokenizer.decode(rollouts.prompts[i].ids)
            chosen.append((i, f"{word}, score {rollouts.scores[i]:.3f}", prompt))
    return chosen

def report_step(run, rollouts, metrics):
    """Log and print a step; for the first and the last, also print a kept and a dropped rollout."""
    log(run, metrics)
    print0(f"step {run.step}/{run.config.steps}: reverse_kl {metrics['reverse_kl']:.3f}, "
           f"length {metrics['response_length']:.0f}, "
           f"{metrics['tokens_per_second']:.0f} tokens/s")
    if metrics["skipped_updates"]:
        print0("warning: no update: nothing was kept, or something is not finite")
    if run.step in (1, run.config.steps):
        for i, verdict, prompt in examples(run, rollouts, 1):
            response = run.tokenizer.decode(rollouts.tokens[i, rollouts.mask[i]])
            print0(f"{verdict}: {prompt[-80:]!r} -> {response[-400:]!r}")

def history(run, pattern):
    """The metrics with such names, where they are not null. -> {name: [(step, value), ...]}"""
    found = {}
    for row in run.log:
        for name, value in row.items():
            if value is not None and re.fullmatch(pattern, name):
                found.setdefault(name, []).append((row["step"], value))
    return dict(sorted(found.items()))

def summarize(run):
    """What changed from first to last, and how to continue."""
    print0(f"\n{'':24}{'first':>12}{'last':>12}")
    for name, points in history(run, "(eval/)?(exact_match|reverse_kl)(/.*)?").items():
        print0(f"{name:24}{points[0][1]:12.3f}{points[-1][1]:12.3f}")
    folder = run.config.output_dir
    print0(f"\n{run.step} of {run.config.steps} steps, metrics in {folder}/metrics.jsonl")
    if run.step == 0 or RANK > 0:
        return
    print0(f"curves and rollouts: {folder}/report.html")
    print0(f"for from_pretrained, vLLM or --student: {checkpoints(folder)[-1]}")
    print0(f"to continue: --config {folder}/config.json --resume --steps {2 * run.step}")

HEAD = """<!doctype html><meta charset="utf-8"><title>FiRe-OPD</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.6 sans-serif; max-width: 62em; margin: 1em auto; overflow-wrap: anywhere }
figure { display: inline-block; vertical-align: top; width: 18em; margin: 0 1em 1em 0 }
svg { width: 100%; height: 6em; fill: none; overflow: visible }
div { position: relative; height: 4em }
div i { position: absolute; width: 8px; height: 8px; border-radius: 4px }
</style>"""
COLORS = ["#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#888888"]

def chart(curves):
    """An HTML figure of metrics {name: [(step, value), ...]}. Its viewBox does the scaling."""
    points = sum(curves.values(), [])
    width = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    html, lines = "", ""
    for i, (name, curve) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        html += f'<span style="color: {color}">{escape(name)} {curve[-1][1]:.3g}</span><br>'
        path = " ".join(f"{step},{high - value}" for step, value in curve)
        lines += f'<polyline points="{path}" stroke="{color}" vector-effect="non-scaling-stroke"/>'
    box = f'viewBox="0 0 {width} {high - low or 1}" preserveAspectRatio="none"'
    return (f"<figure>{html}<svg {box}>{lines}</svg><br>"
            f"<small>{low:.3g} to {high:.3g}, {width} steps</small></figure>")

def background(orange, opacity):
    """An HTML style, orange or blue."""
    rgb = "255,140,0" if orange else "70,130,255"
    return f"background: rgba({rgb},{opacity:.2f})"

def write_report(run, rollouts):
    """report.html: curves of the log, and scores and some rollouts of the latest step."""
    if RANK > 0:
        return
    html = [HEAD]
    for name in ("eval/exact_match", "eval/reverse_kl", "reverse_kl", "response_length",
                 "filter_threshold"):
        curves = history(run, name + ".*")
        if curves:
            html.append(chart(curves))

    finite = rollouts.scores[rollouts.scores.isfinite()].tolist() or [0]
    low, high = min(finite), max(finite)
    html.append(f"<h3>Step {run.step}: scores of the rollouts, {low:.3g} to {high:.3g}; "
                "orange: dropped</h3>")
    for domain in sorted({prompt.domain for prompt in rollouts.prompts}):
        html.append(f"<div>{escape(domain)}")
        for i, prompt in enumerate(rollouts.prompts):
            score = rollouts.scores[i].item()
            if prompt.domain == domain and math.isfinite(score):
                left = 99 * (score - low) / (high - low or 1)  # in %
                top = 10 + i % 8 * 5  # spread in height, so that fewer dots hide each other
                style = background(not rollouts.keep[i], 0.5)
                html.append(f'<i style="left: {left:.2f}%; top: {top}px; {style}"></i>')
        html.append("</div>")

    html.append(f"<h3>Step {run.step}: tokens, orange if they weigh more than 1, else blue</h3>")
    tables = {"w": rollouts.weights,
              "log pi_T": rollouts.teacher_log_probs, "log pi_S": rollouts.student_log_probs,
              "H_T": rollouts.teacher_entropy, "H_S": rollouts.student_entropy}
    for i, verdict, prompt in examples(run, rollouts, 2):
        html.append(f"<p><b>{verdict}:</b> {escape(prompt)} ")
        for t in rollouts.mask[i].nonzero()[:, 0]:
            text = escape(run.tokenizer.decode(rollouts.tokens[i, t]))
            title = ", ".join(f"{name} {table[i, t]:.3f}" for name, table in tables.items())
            weight = rollouts.weights[i, t]
            style = background(weight > 1, rollouts.keep[i] * 1.5 * abs(weight - 1))
            html.append(f'<span title="{title}" style="{style}">{text}</span>')
    path = Path(run.config.output_dir, "report.html")
    path.write_text("".join(html), encoding="utf-8", errors="replace")

# --- Prompts -------------------------------------------------------------------------------------

def first_of(row, keys):
    """The value of the first of these keys that a row has; null counts as absent."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    return None

def tokenize(content, tokenizer, config):
    """The ids of a prompt, a string or a list of messages, as the chat template renders it."""
    if isinstance(content, str):
        if not tokenizer.chat_template:
            return tokenizer(content, verbose=False)["input_ids"]
        content = [{"role": "user", "content": content}]
    for message in content:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError("each message needs a 'role', and a 'content' that is a string")
    if content[-1]["role"] == "assistant":  # a row of a fine-tuning set, with its reply
        content = content[:-1]
    return tokenizer.apply_chat_template(
        content, add_generation_prompt=True, return_dict=False,
        enable_thinking=config.enable_thinking)

def parse_prompt(row, tokenizer, config, vocabulary, teachers):
    """A row of a prompt file -> Prompt"""
    if not isinstance(row, dict):
        raise UserError("each line must be a JSON object")
    content = first_of(row, ["prompt", "problem", "question", "messages"])
    if not content or not isinstance(content, (str, list)):
        raise UserError("give 'prompt', 'problem' or 'question' (a string), or 'messages'")
    ids = list(tokenize(content, tokenizer, config))
    if not ids:
        raise UserError("it has no tokens")
    unknown = sorted(set(ids) - vocabulary)
    if unknown:
        names = tokenizer.convert_ids_to_tokens(unknown)
        raise UserError(f"its tokens {names} are not known to all models")
    teacher = row.get("teacher")
    if teacher is None and len(teachers) == 1:
        teacher = teachers[0]
    if teacher not in teachers:
        raise UserError(f"teacher {teacher!r} is not one of {teachers}")
    answer = first_of(row, ["answer", "ground_truth", "solution"])
    if answer is not None:
        answer = str(answer)
    domain = "" if row.get("domain") is None else str(row["domain"])
    return Prompt(ids, answer, teacher, domain)

def load_prompts(path, tokenizer, config, vocabulary, teachers):
    """The prompts of a JSON Lines file; those that are too long are dropped, and counted."""
    if not path:
        return []
    with fault_of(path):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    prompts = []
    for number, line in enumerate(progress(path, lines), 1):
        if line.strip():
            with fault_of(f"{path} line {number}"):
                row = json.loads(line)
                prompts.append(parse_prompt(row, tokenizer, config, vocabulary, teachers))
    kept = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    print0(f"{path}: {len(kept)} of {len(prompts)} prompts have at most --max-prompt-tokens")
    if len(kept) < WORLD_SIZE:
        raise UserError(f"{path}: fewer prompts than ranks; add some or raise --max-prompt-tokens")
    return kept

# --- Models --------------------------------------------------------------------------------------

def teacher_paths(config):
    """["math=PATH", "code=PATH"] -> {"math": PATH, "code": PATH}; a lone PATH is "teacher"."""
    paths = {}
    for entry in config.teacher:
        name, equals, path = entry.partition("=")
        if not equals or os.path.isdir(entry):
            name, path = "teacher", entry
        if name in paths or name == "student":
            raise UserError(f"--teacher {entry}: give each teacher a NAME=PATH of its own")
        paths[name] = path
    return paths

def shared_vocabulary(configs, tokenizers):
    """The ids that every model has an embedding of, and that are the same token to all of them.
    Added tokens that differ, often reserved ones, are left out; others that differ are an error.
    configs, tokenizers {name: ...}, the student's and the teachers' -> set of ids"""
    tokens = {}  # name -> {id: token}
    for name, tokenizer in tokenizers.items():
        tokens[name] = {i: token for token, i in tokenizer.get_vocab().items()}
    ours = tokens["student"]
    shared = set(ours)
    for name, theirs in tokens.items():
        differ = {i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]}
        wrong = sorted(differ - tokenizers[name].added_tokens_decoder.keys())
        if wrong:
            some = [(i, ours[i], theirs[i]) for i in wrong[:2]]
            raise UserError(f"{name}: {len(wrong)} of the student's {len(ours)} ids mean other "
                            f"tokens, e.g. {some}; the models must share a tokenizer")
        rows = configs[name].get_text_config().vocab_size
        shared &= {i for i in theirs.keys() - differ if i < rows}
    print0(f"vocabulary: {len(shared)} of the student's {len(ours)} tokens are sampled and graded")
    return shared

def end_ids(path, config, tokenizer):
    """All ids that end a response, as a checkpoint's files list them."""
    generation = GenerationConfig()
    with contextlib.suppress(OSError):  # the file is optional
        generation = GenerationConfig.from_pretrained(path)
    ids = set()
    for holder in (tokenizer, config, generation):
        listed = getattr(holder, "eos_token_id", None)
        ids.update(listed if isinstance(listed, list) else [listed])
    return ids - {None}

def load_policy(name, path, eos_ids, vocabulary, config):
    """The student or the named teacher, on its device. In eval mode: with dropout, the policy that
    is trained would differ from the one that wrote the rollouts."""
    is_student = name == "student"
    dtype = compute_dtype(config)
    if is_student:
        dtype = torch.float32  # an AdamW step of 1e-6 would vanish in the rounding of bfloat16
    with fault_of(f"{name} {path}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
        if info["missing_keys"]:
            raise UserError(f"it lacks the weights {sorted(info['missing_keys'])}")
        if model.base_model is model:
            raise UserError(f"{type(model).__name__} is not supported: it has no inner model")
    # Some generation configs load but cannot be saved; checkpoints copy the original file.
    model.generation_config = GenerationConfig()
    model.config.get_text_config().output_router_logits = False  # nothing here reads them
    model.requires_grad_(False).eval()
    if is_student:  # not all of the model: a vision tower gets no gradient from text
        model.get_decoder().requires_grad_()
        model.get_output_embeddings().requires_grad_()
    policy = Policy(model, eos_ids, vocabulary, config)
    if config.shard:
        apply_fsdp(policy, is_student)
    print0(f"{name}: {model.num_parameters():,} parameters from {path}")
    return policy.to(DEVICE)

def compute_dtype(config):
    """The dtype of the teachers' weights, and of a student's matrix products."""
    if config.dtype == "auto":
        return torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return getattr(torch, config.dtype)

def blocks(model):
    """The transformer blocks of the text model."""
    modules = model.get_decoder().modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

def apply_fsdp(policy, is_student):
    """FSDP2. A teacher is gathered block by block, when they run. The student is gathered for the
    first token of `sample`, by all ranks, and sharded again by the backward pass. To gather it for
    every token would be far too slow, and some ranks decode more tokens than others."""
    precision = MixedPrecisionPolicy()
    if is_student and policy.bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks(policy.model):
        fully_shard(block, reshard_after_forward=not is_student, mp_policy=precision)
    # The rest, with head and embedding, stays float32 when gathered: the gradients of the head's
    # chunks are added up in it.
    fully_shard(policy, reshard_after_forward=not is_student)
    register_fsdp_forward_method(policy, "sample")

def load_run(config):
    """Everything a run needs: what is cheap to check, then the output folder, then the models. But
    the tiny pair is made in the output folder, so there the folder comes first. -> Run"""
    if not config.output_dir:
        name = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
        config.output_dir = broadcast(name)
    if config.tiny:
        claim_folder(config)  # and write config.json, before make_tiny fills in its paths
        make_tiny(config)
    paths = {"student": config.student} | teacher_paths(config)
    configs, tokenizers, eos_ids = {}, {}, set()
    for name, path in paths.items():
        with fault_of(f"{name} {path}"):
            configs[name] = AutoConfig.from_pretrained(path, trust_remote_code=False)
            tokenizers[name] = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            eos_ids |= end_ids(path, configs[name].get_text_config(), tokenizers[name])
    if getattr(configs["student"], "quantization_config", None):
        raise UserError(f"student {config.student}: its weights are quantized, which cannot be "
                        "trained; give the unquantized checkpoint")
    tokenizer = tokenizers["student"]
    vocabulary = shared_vocabulary(configs, tokenizers)
    eos_ids &= vocabulary
    if not eos_ids:
        raise UserError("no eos_token_id of the models is a token that all of them know")
    print0(f"responses end with one of {tokenizer.convert_ids_to_tokens(sorted(eos_ids))}")
    teachers = [name for name in paths if name != "student"]
    prompts = load_prompts(config.prompts, tokenizer, config, vocabulary, teachers)
    eval_prompts = load_prompts(config.eval_prompts, tokenizer, config, vocabulary, teachers)
    print0(f"first prompt: {tokenizer.decode(prompts[0].ids)!r}")
    if not config.tiny:
        claim_folder(config)  # not before: a failed check should leave nothing behind
    saved = broadcast(checkpoints(config.output_dir))
    student_path = saved[-1] if saved else config.student
    student = load_policy("student", student_path, eos_ids, vocabulary, config)
    # Before the self-test, whose `sample` gathers the student: AdamW needs sharded parameters.
    trained, optimizer = prepare_training(student, config)
    folder = Path(cached_file(config.student, "config.json")).parent  # also of a hub name
    run = Run(config, tokenizer, prompts, eval_prompts, student, trained, folder, optimizer)
    if saved:
        resume(run, saved[-1])
    self_test(run, "student", student)
    for name in teachers:
        run.teachers[name] = load_policy(name, paths[name], eos_ids, vocabulary, config)
        self_test(run, name, run.teachers[name])
    if RANK == 0:  # without the rows of steps after the checkpoint
        save_rows(Path(config.output_dir, "metrics.jsonl"), run.log)
    return run

def prepare_training(student, config):
    """-> the module to train, which is the student or DDP around it, and the optimizer"""
    trained = student
    if WORLD_SIZE > 1 and not config.shard:
        trained = DistributedDataParallel(student, gradient_as_bucket_view=True)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, config.lr, weight_decay=config.weight_decay, fused=True)
    return trained, optimizer

@torch.no_grad()
def self_test(run, name, policy):
    """`Policy.forward` (chunked head, no cache, padding on the right) must give the log-probs of
    `sample` (transformers' own head, with a cache, padding on the left)."""
    by_length = sorted(run.prompts, key=lambda prompt: len(prompt.ids))
    prompts = by_length[:4] + by_length[-4:]
    longest = len(prompts[-1].ids) + run.config.max_new_tokens
    end = getattr(policy.model.config.get_text_config(), "max_position_embeddings", longest)
    if longest > end:
        print0(f"warning: {name}: prompt and response may take {longest} tokens, but "
               f"max_position_embeddings is {end}: lower --max-new-tokens or --max-prompt-tokens")
    ids = [prompt.ids for prompt in prompts]
    width = min(16, run.config.max_new_tokens)
    key = (run.config.seed, EVALUATE)
    uniforms = stateless_uniforms(key, range(len(ids)), width)
    tokens, sampled, _ = policy.sample(ids, uniforms)
    mask = mask_responses(tokens, policy.eos_ids)
    scored, _ = policy(ids, tokens, mask)  # [8, 16]
    gap = (scored - sampled)[mask].abs().mean().item()
    print0(f"self-test of {name}: log-probs of scoring and sampling are {gap:.1e} apart")
    limit = 0.1 if policy.bf16 else 1e-4  # allowance for rounding, more at low temperatures
    if not gap < limit / min(1, run.config.temperature):  # so that NaN fails, too
        raise UserError(f"{name} is not supported: scoring and sampling differ, as they do if a "
                        "model scales or caps its logits, adds a bias to them, sees padding, or "
                        "has NaN weights")

# --- The run's folder and its checkpoints --------------------------------------------------------

def claim_folder(config):
    """Make the output folder, or with --resume take it as it is, and write the settings. Rank 0
    does this alone: if it fails, torchrun ends the others."""
    if RANK > 0:
        return
    folder = Path(config.output_dir)
    with fault_of(f"output folder {folder}"):
        folder.mkdir(parents=True, exist_ok=config.resume)  # if two runs start at once, one fails
        with atomic_folder(folder / "trial"):  # a mounted bucket may not be able to rename
            pass
        (folder / "trial").rmdir()
        for partial in folder.glob("checkpoint-*.partial"):  # of a run that was killed
            shutil.rmtree(partial)
        write_settings(config, folder / "config.json")
        (folder / "metrics.jsonl").touch()

def write_settings(config, path):
    """config.json: the settings except the folder's place, so that it can be moved. With --resume,
    warn of those that differ from before."""
    settings = dict(vars(config))
    for name in ("config", "resume", "output_dir"):
        del settings[name]
    if path.exists():
        before = json.loads(path.read_text())
        if "filter_percentile" not in before:  # a model's, which must not be overwritten
            raise UserError(f"{path} is not the config of a run")
        # Without a checkpoint nothing is lost. The student of the tiny pair is "" here.
        if checkpoints(path.parent) and before["student"] != settings["student"]:
            raise UserError(f"{path} is of a run with --student {before['student']!r}: give that, "
                            "or another --output-dir")
        for name, value in settings.items():
            if before.get(name) != value:
                print0(f"warning: {name} was {before.get(name)}, is {value}")
    path.write_text(json.dumps(settings, indent=1))

@contextlib.contextmanager
def atomic_folder(folder):
    """A temporary folder to fill, which gets the name `folder` when it is complete, so that a kill
    never leaves a half-written one."""
    temporary = Path(f"{folder}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.iterdir():
        if path.is_file():  # safetensors writes files that others cannot read
            path.chmod(temporary.stat().st_mode & 0o666)
    temporary.rename(folder)

# Full (unsharded) states, on rank 0's CPU. Not strict: what is not trained has no moments.
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)

def checkpoints(folder):
    """Oldest first. Only a complete one ever has this name."""
    return sorted(Path(folder).glob("checkpoint-" + "[0-9]" * 6))

def save_checkpoint(run):
    """The weights in float32 and AdamW's two moments, 12 bytes per parameter, the log, and the
    student's own small files. Prompts and random numbers follow from the step."""
    model = run.student.model
    folder = Path(run.config.output_dir, f"checkpoint-{run.step:06d}")
    weights = dcp.get_model_state_dict(model, options=WHOLE)  # collective: rank 0 gets it all
    moments = dcp.get_optimizer_state_dict(model, run.optimizer, options=WHOLE)
    if RANK == 0:
        names = dict(model.named_parameters()) | dict(model.named_buffers())
        for name in weights.keys() - names.keys():  # a tied head: the embedding under a second name
            del weights[name]
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            copy_small_files(run.student_folder, temporary, run.student.eos_ids)
            state = {"optimizer": moments, "log": run.log}
            # Not .safetensors, which servers would load as weights. To be read with weights_only.
            torch.save(state, temporary / "training.pt")
        for old in checkpoints(folder.parent)[:-2]:
            shutil.rmtree(old)
    barrier()  # NCCL's groups should end together

def copy_small_files(source, target, eos_ids):
    """The student's tokenizer and configuration as they are, so that older versions of transformers
    read them too; only the ends of sequence become those of the rollouts."""
    for path in source.iterdir():
        small = path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt")
        if small and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    path = target / "generation_config.json"
    generation = {}
    if path.exists():
        generation = json.loads(path.read_text())
    generation["eos_token_id"] = sorted(eos_ids)
    path.write_text(json.dumps(generation, indent=2))

def resume(run, folder):
    """Restore step, optimizer and log from a checkpoint; the weights have been loaded."""
    with fault_of(f"{folder} (delete it to resume from the checkpoint before it)"):
        state = torch.load(folder / "training.pt", weights_only=True, mmap=True)
        run.log = state["log"]
    run.step = int(folder.name[-6:])
    print0(f"continues after step {run.step}")
    dcp.set_optimizer_state_dict(
        run.student.model, run.optimizer, state["optimizer"], options=WHOLE)
    for group in run.optimizer.param_groups:  # the settings of now, not those of the checkpoint
        group["lr"] = run.config.lr
        group["weight_decay"] = run.config.weight_decay

def save_rows(path, rows):
    """A JSON Lines file."""
    with open(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")

# --- The tiny pair: a teacher and a student made in seconds --------------------------------------

# A task of tiny_config.json says what each model learns beforehand (`learns`: domains and their
# shares), the student until which loss (`student_loss`), and the shares of the domains among the
# prompts (`mixture`). In "foreign" the teacher, "sum", also grades maxima, which it never learned.

def tiny_tokenizer():
    """One token per character."""
    characters = list("0123456789+,=") + ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(characters)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

def tiny_rows(rng, count, length, mixture):
    """The running sum mod 10 ("+") or maximum (",") of `length` digits, where a mistake can make
    later digits wrong. mixture {domain: share}"""
    shares = list(mixture.values())
    for domain in rng.choice(list(mixture), count, p=shares).tolist():
        digits = rng.integers(0, 10, length)
        results = np.cumsum(digits) % 10 if domain == "+" else np.maximum.accumulate(digits)
        prompt = "".join(map(str, digits)) + domain + "="
        answer = "".join(map(str, results))
        yield {"prompt": prompt, "answer": answer, "domain": domain}

def pretrain(name, tiny, seed):
    """Train a model of the pair on its domains until the smoothed loss is low."""
    kind = "student" if name == "student" else "teacher"
    torch.manual_seed(seed)
    rng = default_rng((seed, PRETRAIN, *name.encode()))
    tokenizer = tiny_tokenizer()
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **tiny[kind]))
    optimizer = torch.optim.AdamW(
        model.parameters(), tiny["pretrain_lr"], weight_decay=0.0, fused=True)
    for step in progress(f"training the tiny {name}", range(tiny["pretrain_steps"])):
        rows = tiny_rows(rng, 128, tiny["digits"], tiny["learns"][name])
        texts = [row["prompt"] + row["answer"] + "<eos>" for row in rows]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # [128, 2 digits + 3]
        labels = ids.clone()
        labels[:, :tiny["digits"] + 2] = -100  # no loss on the prompt
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            smooth = loss.item()
        smooth = 0.8 * smooth + 0.2 * loss.item()
        if smooth < tiny[kind + "_loss"]:
            break
    print0(f"the tiny {name}: loss {smooth:.3f} after {step + 1} steps")
    return model

def make_tiny(config):
    """Make models and prompts, once for an output folder, and fill them in as settings."""
    torch.set_num_threads(1)  # more are slower for models this small
    tiny = config.tiny | config.tiny["tasks"][config.task]
    folder = Path(config.output_dir, f"tiny-{config.task}-{config.seed}")
    if RANK == 0 and not folder.exists():
        with atomic_folder(folder) as temporary:
            for name in tiny["learns"]:
                pretrain(name, tiny, config.seed).save_pretrained(temporary / name)
                tiny_tokenizer().save_pretrained(temporary / name)
            rng = default_rng((config.seed, ORDER))
            rows = tiny_rows(rng, 4096, tiny["digits"], tiny["mixture"])
            save_rows(temporary / "prompts.jsonl", rows)
            rows = tiny_rows(rng, 512, tiny["digits"], tiny["learns"]["student"])
            save_rows(temporary / "eval_prompts.jsonl", rows)
    barrier()
    config.teacher = [f"sum={folder}/sum"]
    config.student = f"{folder}/student"
    config.prompts = f"{folder}/prompts.jsonl"
    config.eval_prompts = f"{folder}/eval_prompts.jsonl"

# --- The command ---------------------------------------------------------------------------------

def start_ranks():
    """Connect this process to the others, and to its GPU."""
    if DEVICE == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        # cuDNN's attention takes 23 to 37 ms to plan for each new length, and most calls bring one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD_SIZE > 1:  # no backend given: gloo for tensors on the CPU, NCCL for those on GPUs
        # Ranks wait for each other's longest rollouts, and for a checkpoint to be written.
        dist.init_process_group(timeout=timedelta(hours=3))

def main(argv):
    """The command: main(["--steps", "5"]) is `python fire_opd.py --steps 5`. A user's mistake is
    one line and SystemExit with status 2."""
    try:
        config = parse_config(argv)
        start_ranks()
        train(config)
    except UserError as error:
        message = " ".join(str(error).split())
        print("error:", message, file=sys.stderr)
        raise SystemExit(2) from error
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    transformers.logging.disable_progress_bar()  # of reading and writing weights
    main(sys.argv[1:])
