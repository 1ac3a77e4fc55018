"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): on-policy distillation in one file.

The student writes responses, the teacher grades each of their tokens, and the student is moved
towards the teacher. FiRe-OPD adds two steps. Filter drops the trajectories that the teacher finds
least likely. Reweight then gives more weight to the remaining tokens on which the teacher is sure
and the student is not. One step, with the function that does it (pi_S: student, pi_T: teacher,
H: entropy of the next token):

  1. rollout: responses y ~ pi_S(.|x) = softmax(logits / temperature), and H_S,t of each token
  2. score: log pi_T(y_t) and H_T,t of each token
  3. filter_trajectories: s = mean_t log pi_T(y_t); keep s >= the 20 % quantile of the step
  4. token_weights: w_t = (1 + alpha (1 - H_T,t / max H_T)) (1 + beta H_S,t / max H_S), divided by
     its mean; maximum and mean are those of the trajectory
  5. policy_loss: the policy gradient of w_t A_t, with A_t = log pi_T(y_t) - log pi_S(y_t)
  6. update: the gradient of all micro-batches and ranks, and one step of AdamW

`train_step` puts these together and `train` is the loop around it. There the method ends, and a
line says so. What follows serves it: fast decoding, flags, metrics, prompts, models, files.

    python fire_opd.py           # the tiny pair of tiny_config.json, no download, about a minute
    python fire_opd.py --teacher T --student S --prompts P.jsonl                 # real models
    torchrun --nproc-per-node 8 fire_opd.py --teacher T --student S --prompts P.jsonl

Left out on purpose: a critic, a reward, a reference model and its KL penalty, several updates a
rollout, top-k or full-vocabulary divergences, an inference server, learning-rate schedules.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import html
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import huggingface_hub
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from numpy.random import default_rng
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

# --- Settings: batch_size is the flag --batch-size, and a key of the --config file --------------

def setting(default, help):
    """A field of Config, with its default and its text for --help, where %% is a percent sign."""
    return field(default=default, metadata={"help": help})

@dataclass
class Config:
    """The settings of a run. The defaults are the method's; sizes are for one GPU."""
    filter_percentile: float = setting(20.0, "the filter drops this share of rollouts, in %%")
    filter_by: Literal["likelihood", "random"] = setting(
        "likelihood", "random: a control that drops as many rollouts, chosen at random")
    alpha: float = setting(1.0, "strength of teacher confidence in the weights")
    beta: float = setting(1.0, "strength of student confusion in the weights")
    token_weights: Literal["soft", "hard"] = setting(
        "soft", "hard: a control that trains on the heavier half of the tokens alone")
    loss_agg: Literal["token-mean", "seq-mean"] = setting(
        "token-mean", "the mean over all tokens, or over rollouts of their own means")
    temperature: float = setting(1.0, "of student and teacher, in sampling and scoring")
    batch_size: int = setting(64, "rollouts a step, over all ranks")
    rollouts_per_prompt: int = setting(1, "rollouts of each prompt in a step")
    max_new_tokens: int = setting(1024, "longest response")
    lr: float = setting(1e-6, "constant learning rate of AdamW (betas 0.9 and 0.999)")
    weight_decay: float = setting(0.01, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "the gradient is clipped to this norm")
    steps: int = setting(100, "steps of training; 0 only evaluates")
    seed: int = setting(0, "of the order of the prompts, of sampling and of the tiny pair")
    teacher: list = field(default_factory=list, metadata={
        "help": "checkpoint folder or hub name; of several teachers each as NAME=PATH"})
    student: str = setting("", "checkpoint folder or hub name")
    prompts: str = setting("", "JSON Lines: prompt; optional answer, teacher, domain, tools")
    eval_prompts: str = setting("", "held-out prompts in the same format")
    chat_template: Literal["auto", "none"] = setting("auto", "auto: the tokenizer's, if it has one")
    enable_thinking: bool = setting(False, "passed on to the chat template")
    max_prompt_tokens: int = setting(1024, "longer prompts are dropped")
    rollout_batch_size: int = setting(64, "rows generated at once on a rank")
    micro_batch_tokens: int = setting(8192, "tokens in a forward pass of scoring and update")
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    compile: bool = setting(False, "compile scoring and update: a minute at first, then faster")
    shard: bool = setting(False, "FSDP2 instead of DDP: shard student, optimizer and teachers")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on a GPU")
    output_dir: str = setting("", "new folder for metrics and checkpoints; default runs/<time>")
    resume: bool = setting(False, "continue the run in --output-dir; if there is none, start it")
    eval_every: int = setting(0, "steps between evaluations; 0: before and after the run")
    save_every: int = setting(0, "steps between checkpoints; 0: at the end")
    keep: int = setting(2, "how many of the newest checkpoints stay on the disk")
    config: str = setting("", "JSON file of settings; the command line wins over it")
    task: str = setting("foreign", "which of the tasks in tiny_config.json, for the tiny pair")
    tiny: dict = field(default_factory=dict)  # JSON only: how the tiny pair is made

# --- The arithmetic of the method: functions of tensors, no models, no globals ------------------

def upcast(x):
    """At least float32, as bfloat16 and float16 are too coarse for a softmax. float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def is_eos(tokens, eos_ids):
    """Which tokens end a response; eos_ids is a set of ids. tokens [...] -> bool [...]"""
    return torch.isin(tokens, tokens.new_tensor(sorted(eos_ids)))

def mask_responses(tokens, eos_ids):
    """True up to and including the first end of sequence. tokens [B, T] -> bool [B, T]

    Found by position: where EOS and padding have the same id, `tokens != pad` would mask the EOS
    too, and the student would never learn to stop.
    """
    ends = is_eos(tokens, eos_ids).long()
    ends_before = ends.cumsum(1) - ends  # how many EOS stand before each token
    return ends_before == 0

def trajectory_scores(teacher_log_probs, response_mask):
    """s = mean_t log pi_T(y_t): how likely the teacher finds each trajectory, in nats per token.

    teacher_log_probs, response_mask [B, T] -> scores [B]. A row without a response scores minus
    infinity, so that it is never kept. As 0, an empty sum, it would have the best score there is.
    """
    mask = response_mask.bool()
    lengths = mask.sum(1)  # [B]
    total = upcast(teacher_log_probs).masked_fill(~mask, 0).sum(1)  # [B]
    scores = total / lengths  # 0 / 0 is NaN
    return scores.masked_fill(lengths == 0, -torch.inf)

def filter_trajectories(scores, percentile):
    """Filter: keep the trajectories whose score is at least the `percentile` quantile.

    scores [B] of the WHOLE step -> keep [B] bool. Not of a micro-batch: a single row would be its
    own quantile and always stay. The quantile is that of all finite scores, interpolated linearly.
    Scores equal to it are kept; NaN and infinite scores never are. percentile=0 keeps all finite
    scores. ValueError if it is not in [0, 100].
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percentile}")
    scores = scores.double()
    finite = scores.isfinite()
    if not finite.any():
        return finite  # nothing to keep
    threshold = scores[finite].quantile(percentile / 100)
    threshold = threshold - 1e-9  # rounding must not lose a score that is the quantile
    return finite & (scores >= threshold)

def token_weights(teacher_entropy, student_entropy, response_mask, alpha=1.0, beta=1.0,
                  scope="trajectory"):
    """Reweight: w_t = (1 + alpha c_t) (1 + beta u_t), divided by its mean over the mask.

    Teacher confidence c_t = 1 - H_T,t / max H_T: a teacher that hesitates teaches little.
    Student confusion  u_t = H_S,t / max H_S: where the student hesitates it has most to learn.
    Entropies (nats) and mask [B, T] -> weights [B, T], zero off the mask, without gradient.
    scope="trajectory": maximum and mean of each row, as in training. scope="batch": of all rows
    together, as in the released code. ValueError for any other.
    """
    if scope not in ("trajectory", "batch"):
        raise ValueError(f"scope must be 'trajectory' or 'batch', got {scope!r}")
    dims = (0, 1) if scope == "batch" else 1
    mask = response_mask.bool()

    def relative(entropy):
        """H / max H, in [0, 1]; 0 where all entropies are 0."""
        entropy = upcast(entropy.detach()).masked_fill(~mask, 0)
        largest = entropy.amax(dims, keepdim=True)
        largest = largest.clamp(min=torch.finfo(entropy.dtype).tiny)  # 0 / 0 would be NaN
        return (entropy / largest).clamp(0, 1)

    confidence = 1 - relative(teacher_entropy)  # [B, T]
    confusion = relative(student_entropy)  # [B, T]
    weights = (1 + alpha * confidence) * (1 + beta * confusion)
    weights = weights.masked_fill(~mask, 0)
    # Mean 1, so that the update is about as large as in plain distillation.
    total = weights.sum(dims, keepdim=True).clamp(min=1e-12)  # else 0 / 0 in an empty row
    return weights * mask.sum(dims, keepdim=True) / total

def token_advantages(teacher_log_probs, student_log_probs):
    """A_t = log pi_T(y_t) - log pi_S(y_t), all [B, T]: how much the teacher prefers the token.

    Its mean over samples estimates -KL(pi_S || pi_T): the k1 estimate of the reverse KL. To
    minimize another divergence E_S[f(u)], u = pi_T / pi_S, take A_t = u f'(u) - f(u) + constant.
    """
    return teacher_log_probs - student_log_probs

def policy_loss(log_probs, old_log_probs, teacher_log_probs, weights, mask, num_tokens,
                clip_ratio=0.2):
    """-(1/num_tokens) sum over mask of min(r_t w_t A_t, clip(r_t, 1-eps, 1+eps) w_t A_t) -> scalar

    A_t is that of old_log_probs, without gradient, and r_t = pi_S / pi_S_old. `update` gives
    log_probs.detach() as old_log_probs, so r_t is 1 in value and has the gradient of log pi_S:
    plain REINFORCE. The clip acts only where one rollout serves several updates.
    All tensors [B, T]. num_tokens: how many tokens the whole step keeps. With seq-mean it is the
    number of kept rollouts, and the weights come divided by the length of their response.
    Gradients of micro-batches ADD: divided by their own count, the tokens of a short one would
    weigh more.
    """
    outside = ~mask.bool()
    advantages = token_advantages(teacher_log_probs, old_log_probs)  # [B, T]
    weighted = (weights * advantages).detach().masked_fill(outside, 0)
    log_ratio = log_probs - old_log_probs.detach()
    ratio = log_ratio.masked_fill(outside, 0).exp()  # else infinities there make the gradient NaN
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    objective = torch.minimum(ratio * weighted, clipped * weighted)
    return -objective.sum() / num_tokens

def chunk_log_probs(hidden, lm_head_weight, bias, targets, with_entropy):
    """log pi(target) and H of one chunk of n tokens; zeros for H if it is not wanted.

    hidden [n, D], lm_head_weight [V, D], bias [V], targets [n] -> [n], [n]. Under autocast the
    logits are rounded to bfloat16: unbiased noise of 0.01 to 0.02 nats a token. Softmax and
    entropy are in float32.
    """
    logits = torch.addmm(bias, hidden, lm_head_weight.T)  # hidden @ W.T + bias, [n, V]
    logits = upcast(logits)
    log_p = logits.log_softmax(1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    if not with_entropy:
        return log_probs, torch.zeros_like(log_probs)
    log_p = log_p.detach()
    entropy = -(log_p.exp() * log_p).nansum(1)  # nansum: 0 log 0 is 0
    return log_probs, entropy

def token_log_probs_and_entropy(hidden, lm_head_weight, targets, temperature=1.0, chunk=None,
                                bias=None, with_entropy=True, chunk_function=chunk_log_probs):
    """log pi(target_n) and H_n of pi = softmax((hidden W^T + bias) / temperature), by chunks.

    hidden [N, D], lm_head_weight [V, D], bias [V], targets [N] -> log_probs [N], differentiable,
    and entropy [N], which is not (and 0 if not wanted), in nats. With V = 152 k the logits of 8,192
    tokens take 5 GB, and their gradient several times that. So only one chunk has logits at a
    time, and the backward pass computes them again. Each chunk also adds a whole [V, D] to the
    gradient of W. A chunk of far fewer than D tokens would spend its time on that: the default is
    max(128, D). chunk_function: chunk_log_probs, or the same compiled.
    """
    if chunk is None:
        chunk = max(128, hidden.shape[1])
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

    logits [B, V], uniforms [B] in [0, 1) -> tokens, log_probs, entropy, all [B]. As u comes from
    outside, there is no generator whose state must be saved or shared. The cumulative sum is in
    float64, because in float32 it misses 1 over 152 k tokens; u is scaled by its last entry.
    """
    probs = (upcast(logits) / temperature).softmax(1)
    cdf = probs.cumsum(1, dtype=torch.float64)  # [B, V]
    points = uniforms.double() * cdf[:, -1]  # below the end, as u is below 1
    tokens = torch.searchsorted(cdf, points[:, None], right=True)  # never one of probability 0
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # [B, 1]; it is beyond only if logits are NaN
    log_probs = probs.gather(1, tokens)[:, 0].log()
    entropy = -(probs * probs.log()).nansum(1)
    return tokens[:, 0], log_probs, entropy

# What random numbers are for, as part of their key. To change these would change all runs.
SAMPLE, EVALUATE, ORDER, FILTER, PRETRAIN = 0, 1, 2, 3, 5

def stateless_uniforms(key, rows, width):
    """Uniforms in [0, 1), float64 [b, width]. Those of row i depend on key and i alone.

    Not on the rank, the batch or what was drawn before. So a run on 1, 2 or 4 ranks is the same up
    to the rounding of floats, and resuming has no generator to restore. key is (seed, purpose,
    step), or (seed, purpose) if all steps are to share them.
    """
    drawn = [default_rng((*key, i)).random(width) for i in rows]
    return torch.tensor(np.array(drawn))

# Two controls that the method has to beat: a random filter, and weights that are hard.

def random_scores(scores, noise):
    """Noise in the place of scores: the filter then drops at random. scores, noise [B] -> [B]"""
    return noise.masked_fill(~scores.isfinite(), math.nan)

def hard_weights(weights, response_mask):
    """The heavier half of each row's tokens, all alike and with mean 1, the others 0.

    weights, response_mask [B, T] -> [B, T], zero off the mask.
    """
    hard = torch.zeros_like(weights)
    for row, length in enumerate(response_mask.sum(1).tolist()):
        half = (length + 1) // 2
        if half > 0:
            heaviest = weights[row].argsort(descending=True, stable=True)[:half]
            hard[row, heaviest] = length / half
    return hard

# --- Ranks: torchrun starts one process (a rank) for each GPU; each takes its share of the rows --

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STOP = threading.Event()  # set by Ctrl-C and other signals: stop after this step

def sum_over_ranks(table):
    """Sum a CPU tensor over the ranks, in place. Each rank fills its own rows of a table of zeros,
    so the sum is the whole table, exactly the same on all ranks, which then filter alike."""
    if WORLD_SIZE > 1:
        dist.all_reduce(table)
    return table

def any_rank(flag):
    """Whether the flag is true on any rank. All get the same answer, and take the same branch."""
    return sum_over_ranks(torch.tensor(float(flag))).item() > 0

def barrier():
    """Go on when all ranks have come here."""
    any_rank(False)

def broadcast(value):
    """What rank 0 has, on all ranks."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    return box[0]

# --- Policies: a causal language model, teacher or student, as the method sees it ----------------

class Policy(nn.Module):
    """`forward` scores given responses, `sample` writes new ones, both at the same temperature.
    eos_ids and vocabulary are sets of ids; only those of the vocabulary are ever sampled."""
    segment = 64  # every so many tokens, the rows that have ended leave the batch

    def __init__(self, model, eos_ids, vocabulary, config):
        super().__init__()
        self.model = model
        self.eos_ids = eos_ids
        self.temperature = config.temperature
        self.autocast_to_bf16 = compute_dtype(config) == torch.bfloat16
        self.use_cuda_graph = False  # in decoding; `make_policy` may turn it on
        # The head may have rows that are no token, or one that another model lacks. A bias of
        # minus infinity excludes them. Cutting them off would leave an odd width, slow on a GPU.
        head = model.get_output_embeddings().weight  # [V, D]
        vocabulary_bias = torch.full(head.shape[:1], -torch.inf, device=head.device)
        vocabulary_bias[sorted(vocabulary)] = 0
        self.register_buffer("vocabulary_bias", vocabulary_bias, persistent=False)  # [V]
        self.chunk_function = chunk_log_probs
        if config.compile:
            self.chunk_function = torch.compile(chunk_log_probs, dynamic=True)
            for block in blocks(model):
                block.compile(dynamic=True)

    def autocast(self):
        """Matrix products in bfloat16, if that is wanted. The weights are cast once, for all that
        is computed inside, such as all tokens of a rollout."""
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast_to_bf16)

    def forward(self, ids, mask):
        """log pi(y_t) and H_t, 0 off the mask. ids, response mask, returns: all [b, L]

        H_t is computed only under no_grad, and else all 0: the update does not need it.
        """
        wants_entropy = not torch.is_grad_enabled()
        with self.autocast():
            # Padding is on the right, where a causal model never looks: no attention mask.
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden = hidden[:, :-1][mask[:, 1:]]  # [n, D]: position t - 1 predicts token t
            head = self.model.get_output_embeddings()
            weight, bias = head.weight, self.vocabulary_bias
            if getattr(head, "bias", None) is not None:
                bias = bias + head.bias
            if torch.is_grad_enabled():
                weight = upcast(weight)  # bf16 in FSDP; the chunks' gradients add up in float32
            log_probs, entropy = token_log_probs_and_entropy(  # [n]
                hidden, weight, ids[mask], self.temperature, bias=bias,
                with_entropy=wants_entropy, chunk_function=self.chunk_function)
        # Put the n values back where the mask took them from.
        zeros = log_probs.new_zeros(ids.shape)
        return zeros.masked_scatter(mask, log_probs), zeros.masked_scatter(mask, entropy)

    @torch.no_grad()
    def sample(self, prompts, uniforms):
        """One response to each of b prompts, lists of ids. uniforms [b, T] in [0, 1)
        -> tokens, log_probs, entropy, all [b, T]; what follows a row's EOS means nothing."""
        b, T = uniforms.shape
        uniforms = uniforms.to(DEVICE)
        tokens = torch.zeros_like(uniforms, dtype=torch.long)
        log_probs = torch.zeros_like(uniforms, dtype=torch.float32)
        entropy = torch.zeros_like(log_probs)
        ids, attention = left_padded(prompts)  # [b, width]; later ids is the last token, [n, 1]
        width = ids.shape[1]
        positions = (attention.cumsum(1) - 1).clamp(min=0)  # like ids; padding is not counted
        rows = torch.arange(b, device=DEVICE)  # [n], those still being written; n = b at first
        cache = RolloutCache(self.model, position=torch.tensor([width - 1], device=DEVICE))
        # `step` changes ids, positions, attention and cache in place, as a CUDA graph must. Every
        # `segment` tokens they are made anew, without the rows that have ended.

        def draw(visible):
            """Feed in ids and draw token t of each row. visible: the attention mask. -> [n, 1]"""
            t = cache.position - (width - 1)  # [1], which token is being drawn
            logits = self.model(
                input_ids=ids, attention_mask=visible, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            drawn = sample_tokens(
                logits + self.vocabulary_bias, uniforms[rows, t], self.temperature)  # [n] each
            tokens[rows, t], log_probs[rows, t], entropy[rows, t] = drawn  # t [1] is for all rows
            return drawn[0][:, None]

        def step():
            """The next token of each row."""
            cache.position.add_(1)
            attention.index_fill_(1, cache.position, True)
            ids.copy_(draw(cache.mask(attention)))
            positions.add_(1)

        # --compile has compiled the blocks for whole sequences; in decoding they stay eager.
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            ids = draw(attention)
            positions = positions[:, -1:] + 1
            for start in progress(f"{b} rollouts", range(1, T, self.segment)):
                # Rows that ended leave, so that the batch does not wait for its longest row.
                ended = is_eos(tokens[rows, :start], self.eos_ids).any(1)
                going = (~ended).nonzero()[:, 0]
                if len(going) == 0:
                    break
                ids, positions, rows = ids[going], positions[going], rows[going]
                steps = min(self.segment, T - start)
                # The cache keeps these rows, with room for the next tokens.
                attention = cache.make_room(attention, going, width + start - 1, steps)
                repeat(step, steps, self.use_cuda_graph and cache.roomy)
        return tokens.cpu(), log_probs.cpu(), entropy.cpu()

# --- One step: rollout, score, filter, reweight, update ------------------------------------------

@dataclass
class Prompt:
    """A line of the prompt file."""
    ids: list  # token ids, the same for the student and its teacher
    answer: str | None  # None if it is not known
    teacher: str  # the name of the teacher that grades it
    domain: str  # evaluations also give the figures of each domain

@dataclass
class Rollouts:
    """The trajectories of one step, as tables on the CPU that are the same on every rank. A row is
    prompt and response, padded on the right to L. In every table column t belongs to ids[:, t],
    with no shift by one, and all but ids are 0 outside of the response."""
    prompts: list  # B prompts
    lengths: list  # B numbers of tokens, prompt and response
    ids: Tensor  # [B, L]
    mask: Tensor  # [B, L] bool, the response mask
    log_probs: Tensor  # [B, L] log pi_S(y_t), as sampled; the loss takes those of its own pass
    student_entropy: Tensor  # [B, L] H_S,t, as sampled

    def select(self, table, rows):
        """These rows of a table [B, L], on the device, as wide as the longest."""
        if not rows:  # a rank without rows must still join in: one row, all of it masked
            return table.new_zeros(1, 2).to(DEVICE)
        width = max(self.lengths[i] for i in rows)
        return table[rows, :width].to(DEVICE)

@dataclass
class Graded:
    """Rollouts, with what teacher, filter and weights have made of them."""
    rollouts: Rollouts
    teacher_log_probs: Tensor  # [B, L] log pi_T(y_t)
    teacher_entropy: Tensor  # [B, L] H_T,t
    scores: Tensor  # [B]
    keep: Tensor  # [B] bool
    weights: Tensor | None  # [B, L], zero in dropped rows; None in an evaluation

@dataclass
class Run:
    """What a run holds, as `load` has made it. `run.config.x` is the setting --x."""
    settings: Config  # as the user gave them, and as config.json has them
    config: Config  # what the code reads: the same, with the folders of a tiny pair filled in
    tokenizer: object
    prompts: list  # of Prompt
    eval_prompts: list
    student: Policy
    trained: nn.Module  # what `update` calls: the student, or DDP around it
    optimizer: torch.optim.Optimizer
    files: dict  # {name: bytes}: the student's tokenizer and the like, for its checkpoints
    teachers: dict = field(default_factory=dict)  # name -> Policy
    step: int = 0  # steps done
    evaluated: int = -1  # the step of the last evaluation

def train_step(run):
    """One step of FiRe-OPD. -> Graded, metrics"""
    config = run.config
    stopwatch = Stopwatch()  # the seconds of each phase, for the metrics
    # 1. the student writes
    prompts = step_prompts(run)  # B
    rollouts = rollout(run, prompts, (config.seed, SAMPLE, run.step))
    stopwatch.lap("rollout")
    # 2. the teacher grades
    teacher_log_probs, teacher_entropy = score(run, rollouts)  # [B, L]
    stopwatch.lap("score")
    # 3. filter
    scores = trajectory_scores(teacher_log_probs, rollouts.mask)  # [B]
    keep = filter_trajectories(ranking(run, scores), config.filter_percentile)  # [B]
    # 4. reweight
    mask = rollouts.mask & keep[:, None]  # [B, L]
    weights = token_weights(
        teacher_entropy, rollouts.student_entropy, mask, config.alpha, config.beta)
    if config.token_weights == "hard":
        weights = hard_weights(weights, mask)
    # 5. loss, 6. update
    metrics = update(run, rollouts, teacher_log_probs, keep, weights)
    stopwatch.lap("update")
    graded = Graded(rollouts, teacher_log_probs, teacher_entropy, scores, keep, weights)
    return graded, metrics | measure_step(run, graded, stopwatch)

def ranking(run, scores):
    """What the filter ranks by: the scores, or as a control random numbers. -> [B]"""
    if run.config.filter_by == "likelihood":
        return scores
    key = (run.config.seed, FILTER, run.step)
    noise = stateless_uniforms(key, [0], len(scores))  # [1, B]
    return random_scores(scores, noise[0])

def step_prompts(run):
    """The prompts of this step. Each epoch is a fresh permutation of all of them."""
    config = run.config
    n = len(run.prompts)
    count = config.batch_size // config.rollouts_per_prompt
    chosen = []
    for k in range(run.step * count, (run.step + 1) * count):  # k counts from the run's start
        epoch, place = divmod(k, n)
        if place == 0 or not chosen:  # a new epoch, or the first prompt of this step
            order = default_rng((config.seed, ORDER, epoch)).permutation(n)
        chosen += [run.prompts[order[place]]] * config.rollouts_per_prompt
    return chosen

def rollout(run, prompts, key):
    """Step 1. The student writes one response to each prompt, each rank its share. -> Rollouts"""
    config = run.config
    B, T = len(prompts), config.max_new_tokens
    tokens = torch.zeros(B, T, dtype=torch.long)
    log_probs = torch.zeros(B, T)
    entropy = torch.zeros(B, T)
    share = list(range(RANK, B, WORLD_SIZE))
    for start in range(0, len(share), config.rollout_batch_size):
        rows = share[start:start + config.rollout_batch_size]
        ids = [prompts[i].ids for i in rows]
        uniforms = stateless_uniforms(key, rows, T)
        drawn = run.student.sample(ids, uniforms)
        tokens[rows], log_probs[rows], entropy[rows] = drawn
    for table in (tokens, log_probs, entropy):
        sum_over_ranks(table)
    return lay_out(prompts, run.student.eos_ids, tokens, log_probs, entropy)

def lay_out(prompts, eos_ids, tokens, log_probs, entropy):
    """From tables of responses [B, T] to tables of prompts and responses [B, L]. -> Rollouts"""
    valid = mask_responses(tokens, eos_ids)  # [B, T]
    starts = torch.tensor([[len(prompt.ids)] for prompt in prompts])  # [B, 1]
    ends = starts + valid.sum(1, keepdim=True)
    positions = torch.arange(int(ends.max()))  # [L]
    mask = (starts <= positions) & (positions < ends)  # [B, L]

    def behind_prompts(table):  # each row of mask has as many places as that of valid has tokens
        return table.new_zeros(mask.shape).masked_scatter(mask, table[valid])

    ids = behind_prompts(tokens)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt.ids)] = torch.tensor(prompt.ids)
    log_probs = behind_prompts(log_probs)
    entropy = behind_prompts(entropy)
    return Rollouts(prompts, ends[:, 0].tolist(), ids, mask, log_probs, entropy)

def micro_batches(rows, lengths, budget):
    """This rank's share of `rows`, in lists of at most `budget` tokens with padding (or one row).

    Sorted by length, so that there is little padding, and a list's first row is its longest. All
    ranks get as many lists, some of which may be empty: a rank that has nothing left must still
    take part in every collective.
    """
    share = math.ceil(len(rows) / WORLD_SIZE)  # no list takes more, or one rank might get them all
    batches = []
    room = 0  # how many rows the last list still takes
    for i in sorted(rows, key=lambda i: lengths[i], reverse=True):
        if room == 0:
            batches.append([])
            room = min(share, max(1, budget // lengths[i]))
        batches[-1].append(i)
        room -= 1
    while len(batches) % WORLD_SIZE:
        batches.append([])
    return batches[RANK::WORLD_SIZE]

@torch.no_grad()
def score(run, rollouts):
    """Step 2. Each row's own teacher grades its tokens. -> log pi_T(y_t) and H_T,t, both [B, L]"""
    B, L = rollouts.ids.shape
    tables = torch.zeros(2, B, L)  # of which each rank fills its share
    for name, teacher in run.teachers.items():
        rows = [i for i, prompt in enumerate(rollouts.prompts) if prompt.teacher == name]
        for micro in micro_batches(rows, rollouts.lengths, run.config.micro_batch_tokens):
            ids = rollouts.select(rollouts.ids, micro)  # [b, l]
            mask = rollouts.select(rollouts.mask, micro)
            both = torch.stack(teacher(ids, mask))  # [2, b, l]
            tables[:, micro, :ids.shape[1]] = both.cpu()  # an empty micro selects no row
    return sum_over_ranks(tables)

def update(run, rollouts, teacher_log_probs, keep, weights):
    """Steps 5 and 6. Only kept trajectories go through the student.

    Gradients add up over micro-batches, which fit into memory, and over ranks. Each is divided by
    the same number, counted over the whole step beforehand, so the result does not depend on how
    the step is cut. keep [B], tables [B, L] -> metrics
    """
    config = run.config
    rows = keep.nonzero()[:, 0].tolist()
    divisor = int(rollouts.mask[rows].sum())  # kept tokens
    if config.loss_agg == "seq-mean":  # the mean over trajectories of their own means
        response_lengths = rollouts.mask.sum(1, keepdim=True)  # [B, 1]
        weights = weights / response_lengths.clamp(min=1)
        divisor = len(rows)
    loss = torch.zeros(())
    in_ddp = run.trained is not run.student
    micros = micro_batches(rows, rollouts.lengths, config.micro_batch_tokens)
    for micro in micros:
        ids = rollouts.select(rollouts.ids, micro)  # [b, l]
        mask = rollouts.select(rollouts.mask, micro)
        teacher = rollouts.select(teacher_log_probs, micro)
        weight = rollouts.select(weights, micro)
        if in_ddp:  # exchange gradients in the last backward only; DDP reads this in its forward
            run.trained.require_backward_grad_sync = micro is micros[-1]
        log_probs, _ = run.trained(ids, mask)  # [b, l]
        # The ratio's old policy is this very pass, not the sampler: the two round differently,
        # and a ratio that is not exactly 1 would add noise to every gradient.
        part = policy_loss(log_probs, log_probs.detach(), teacher, weight, mask, divisor)
        (part * WORLD_SIZE).backward()  # DDP and FSDP take the mean over ranks, we want the sum
        loss += part.detach().cpu()
    loss = sum_over_ranks(loss).item()
    norm = clip_gradient(run)
    if rows and rollouts.log_probs.isfinite().all() and math.isfinite(loss + norm):
        skipped = 0
        run.optimizer.step()
    else:  # nothing was kept, or something is not finite: the parameters stay as they are
        skipped = 1
        loss = math.nan
    run.optimizer.zero_grad(set_to_none=not in_ddp)  # DDP's gradients lie in its buckets: zeroed
    return {"loss": loss, "grad_norm": norm, "skipped_updates": skipped}

def clip_gradient(run):
    """Scale the gradient down to --max-grad-norm, over all its shards. -> the norm it had"""
    norm = nn.utils.clip_grad_norm_(run.student.parameters(), run.config.max_grad_norm)
    if hasattr(norm, "full_tensor"):  # of a sharded student
        norm = norm.full_tensor()
    return norm.item()

def prepare_training(student, config):
    """-> the student as the update sees it, and its optimizer"""
    trained = student
    if WORLD_SIZE > 1 and not is_sharded(config):
        trained = DistributedDataParallel(student, gradient_as_bucket_view=True)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
    return trained, optimizer

# --- The run -------------------------------------------------------------------------------------

def train(config):
    """A whole run, or with --resume the rest of one. -> whether all steps are done"""
    run = load(config)
    evaluate_if_due(run)
    while run.step < config.steps and not stop_asked():
        graded, metrics = train_step(run)
        run.step += 1
        report_step(run, graded, metrics)
        if due(run, config.save_every):
            save_checkpoint(run)  # before the evaluation: if that is killed, the step is safe
        evaluate_if_due(run)
    if 0 < run.step < config.steps:  # told to stop
        save_checkpoint(run)
    summarize(run)
    return run.step >= config.steps

def due(run, every):
    """Whether this step is the last, or a multiple of `every`; 0: only the last."""
    if every > 0 and run.step % every == 0:
        return True
    return run.step == run.config.steps

def stop_asked():
    """Whether a signal asked any rank to stop: so all stop after the same step."""
    return any_rank(STOP.is_set())

def evaluate_if_due(run):
    """Before the run, every --eval-every steps, and after it; once a step, not when stopping."""
    if run.step == 0 or due(run, run.config.eval_every):
        if run.evaluated != run.step and not stop_asked():
            evaluate(run)

# === The method ends here; plumbing follows ======================================================

# --- Fast decoding: a cache with room, and CUDA graphs ------------------------------------------

class RoomyLayer(DynamicLayer):
    """Keys and values with free slots, into which the coming tokens are written: appending would
    copy all of them for every token. Keys take the values' dtype, as under autocast rotary
    embeddings leave them in float32."""

    def __init__(self, position):
        super().__init__()
        self.position = position  # [1], the slot of the token that is fed in

    def update(self, keys, values, *args, **kwargs):
        """The first call brings the prompts' keys and values, each later one those of a token, for
        the room that `make_room` made. -> all of them, with the room, [n, heads, L, d]"""
        keys = keys.to(values.dtype)
        if not self.is_initialized:
            return super().update(keys, values)
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values

def rope_parameters(config):
    """Of a model with rotary positions; else empty."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return {}
    return parameters

class RolloutCache(transformers.DynamicCache):
    """A cache from which rows can be removed. Its layers have room if all of them attend to all
    tokens, by torch's own attention and with rotary positions. Else they are transformers' own."""

    def __init__(self, model, position):
        super().__init__(config=model.config)
        self.position = position  # [1], the slot of the token that is fed in
        config = model.config.get_text_config()
        rope = rope_parameters(config)
        # These ask the GPU for the length, which a CUDA graph cannot record.
        asks_for_length = rope.get("rope_type") in ("dynamic", "longrope")
        rotary = len(rope) > 0 and not asks_for_length
        alibi = getattr(config, "alibi", False)
        torch_attention = model.config._attn_implementation == "sdpa"
        plain = all(type(layer) is DynamicLayer for layer in self.layers)
        self.roomy = rotary and not alibi and torch_attention and plain
        if self.roomy:
            self.layers = [RoomyLayer(position) for _ in self.layers]

    def make_room(self, attention, going, used, room):
        """Keep only the rows `going`, their `used` slots, and add room for more. -> attention"""
        if self.roomy:
            while (used + room) % 8:  # attention kernels want widths of 8
                room += 1
            for layer in self.layers:
                keys = layer.keys[going, :, :used]  # [n, heads, used, d]
                values = layer.values[going, :, :used]
                layer.keys = F.pad(keys, (0, 0, 0, room))  # behind `used`
                layer.values = F.pad(values, (0, 0, 0, room))
        else:
            self.reorder_cache(going)  # made for beam search: here it keeps these rows
        return F.pad(attention[going, :used], (0, room))

    def mask(self, attention):
        """The attention mask of the last token, in the form that the layers want."""
        if self.roomy:
            return attention[:, None, None]  # [n, 1, 1, L] bool
        return attention[:, :self.position.item() + 1]  # [n, length]

def repeat(step, times, capture):
    """Run step() `times` times. With capture its kernels are recorded in a CUDA graph, which then
    runs them without Python. They read and write the very same tensors each time."""
    step()  # which also warms up what must not be recorded
    if capture and times > 2:
        graph = torch.cuda.CUDAGraph()
        # thread_local: CUDA calls of other threads, such as NCCL's, do not break the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()  # recorded, and not run
        step = graph.replay
    for _ in range(times - 1):
        step()

def left_padded(prompts):
    """Lists of ids, padded on the left -> ids, attention bool, both [b, longest]"""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left", padding_value=-1)
    ids = ids.to(DEVICE)
    return ids.clamp(min=0), ids >= 0

# --- The command line ----------------------------------------------------------------------------

class UserError(Exception):
    """A user's mistake. Its text is one line: what is wrong, where, and what to do."""

@contextlib.contextmanager
def explain(what, advice):
    """Turn whatever a library raises on a user's file into one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        if type(error) is not ValueError:  # which needs no name: most are ours
            cause = f"{type(error).__name__}: {cause}"
        raise UserError(f"{what}: {cause}; {advice}") from error

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        raise UserError(f"settings: {message}; see --help")

def make_parser():
    """A flag for each setting."""
    parser = Parser(description=__doc__.splitlines()[0], usage="fire_opd.py [--SETTING VALUE ...]",
                    allow_abbrev=False)
    for item in dataclasses.fields(Config):
        if item.name == "tiny":
            continue
        options = {"type": item.type}
        if item.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif item.type is list:
            options = {"action": "extend", "nargs": "+"}
        elif get_args(item.type):  # of a Literal
            options = {"choices": get_args(item.type)}
        text = item.metadata["help"]
        if item.default not in ("", dataclasses.MISSING):
            text += f" [{item.default}]"
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, help=text, **options)
    return parser

def as_flags(settings):
    """{"lr": 0.1, "shard": true} -> ["--lr=0.1", "--shard"], so that a file is checked as flags."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if name not in vars(Config()):
            raise ValueError(f"{name!r} is not a setting")
        if name == "teacher" and isinstance(value, list):
            for x in value:
                flags.append(f"--{flag}={x}")
        elif value is True:
            flags.append(f"--{flag}")
        elif value is False:
            flags.append(f"--no-{flag}")
        elif isinstance(value, (int, float, str)):
            flags.append(f"--{flag}={value}")
        else:
            raise ValueError(f"{name} must be a string or a number, got {value}")
    return flags

def parse_config(argv=()):
    """Defaults, then the JSON file, then the command line. No models given: tiny_config.json."""
    parser = make_parser()
    config = parser.parse_args(argv, Config())  # a first time, to find --config
    path = config.config
    if not path and not config.teacher and not config.student and not config.prompts:
        path = str(Path(__file__).with_name("tiny_config.json"))
    if path:
        with explain(f"config {path}", "give a JSON object of settings"):
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
            tiny = settings.pop("tiny", {})
            if config.teacher:  # the command line's replace the file's, they are not added
                settings.pop("teacher", None)
            config = parser.parse_args([*as_flags(settings), *argv], Config(tiny=tiny))
    config.config = path
    folder = Path(path).parent
    if path and config.resume and not config.output_dir:
        if (folder / "metrics.jsonl").exists():  # the config.json of a run, perhaps a moved one
            config.output_dir = str(folder)
    check(config)
    return config

def check(config):
    """Bounds, and what must go together."""
    if not 0 <= config.filter_percentile <= 100:
        raise UserError(f"filter_percentile must be in [0, 100], got {config.filter_percentile}")
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not 0 <= value <= 1e9:
            raise UserError(f"{name} must be in [0, 1e9], got {value}")
    for name in ("temperature", "lr", "max_grad_norm", "batch_size", "rollouts_per_prompt",
                 "max_new_tokens", "rollout_batch_size", "micro_batch_tokens", "keep"):
        if getattr(config, name) == 0:
            raise UserError(f"{name} must be greater than 0")
    if config.batch_size % config.rollouts_per_prompt or config.batch_size % WORLD_SIZE:
        raise UserError("batch_size must be a multiple of rollouts_per_prompt and of the "
                        f"{WORLD_SIZE} ranks, got {config.batch_size}")
    if config.tiny and (config.teacher or config.prompts or config.eval_prompts):
        raise UserError(f"the tiny pair of {config.config} brings its own teacher and prompts; "
                        "leave one out")
    if not config.tiny and not (config.teacher and config.student and config.prompts):
        raise UserError("--teacher, --student and --prompts go together; give all three")
    if config.steps > 999_999:
        raise UserError("steps must be at most 999999: a checkpoint's name has six digits")
    for path in (config.prompts, config.eval_prompts):
        if path and not os.path.exists(path):
            raise UserError(f"{path}: no such file, seen from the current folder; give another")
    if config.resume and config.steps == 0:
        raise UserError("--resume needs --steps; to evaluate a checkpoint give it as --student")
    if config.resume and not config.output_dir:
        raise UserError("--resume needs the folder of the run: --output-dir, or its config.json")

# --- Metrics and evaluation ----------------------------------------------------------------------

class Stopwatch:
    """The seconds of a step's phases. Each ends when a result is on the CPU, so a GPU has done its
    work, but for AdamW's step, which counts in the next."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, phase):
        """The phase ends here."""
        now = time.perf_counter()
        self.seconds["seconds_" + phase] = now - self.last
        self.last = now

NUMBER = (r"(?<![\d.])[-\u2212]?"  # a sign, not inside of another number
          r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d*\.\d+|\d+)"  # 1,234 or .5 and 3.5 or 12
          r"(?:\.\d+)?(?:/\d+)?")  # 1,234.5 and 3/4

def final_answer(text):
    """What stands in the last \\boxed{...}, or else the last number, or else all of it."""
    _, box, rest = text.rpartition("\\boxed{")
    if box:
        depth = 1
        for end, character in enumerate(rest):
            if character == "{":
                depth += 1
            elif character == "}":
                depth -= 1
            if depth == 0:
                return rest[:end]
    numbers = re.findall(NUMBER, text)
    if numbers:
        return numbers[-1]
    return text

def normalized(text):
    """An answer without what does not matter: spaces, $, %, \\text, \\left, thousands separators,
    trailing zeros of decimals, and with one way to write minus, fractions and 0.5."""
    text = text.replace("\u2212", "-")
    text = re.sub("[dt]frac", "frac", text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\left|\\right|\\[,!;]|\{,\}|\\?[$%]|\s", "", text).rstrip(".,")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,234
    text = re.sub(r"^(-?)\.", r"\g<1>0.", text)  # .5
    return re.sub(r"(\.\d*[1-9])0+$|\.0+$", r"\1", text)  # 1.50, 3.0

def is_correct(response, answer):
    """Whether a response is the answer or ends in it; the answer may be a worked solution."""
    if "\\boxed{" in answer:
        answer = final_answer(answer)
    answer = normalized(answer.split("####")[-1])  # as the solutions of GSM8K end
    return answer in (normalized(response), normalized(final_answer(response)))

def correctness(run, rollouts):
    """Which rollouts [B] are correct: 1 or 0, NaN where no answer is known."""
    correct = torch.full((len(rollouts.prompts),), math.nan)
    for i, prompt in enumerate(rollouts.prompts):
        if prompt.answer is not None:
            response = rollouts.ids[i][rollouts.mask[i]]
            text = run.tokenizer.decode(response, skip_special_tokens=True)
            correct[i] = is_correct(text, prompt.answer)
    return correct

def averages(run, graded, groups):
    """Means over the tokens or trajectories of groups of rows; of an empty group they are NaN.
    groups {suffix of the names: rows [B] bool}"""
    rollouts = graded.rollouts
    correct = correctness(run, rollouts)
    ends = is_eos(rollouts.ids, run.student.eos_ids) & rollouts.mask  # [B, L]
    ended = ends.any(1)  # [B]
    metrics = {}
    for suffix, rows in groups.items():
        rows = rows & graded.scores.isfinite()
        valid = rollouts.mask & rows[:, None]  # [B, L]
        known = rows & correct.isfinite()
        values = {
            "reverse_kl": (rollouts.log_probs - graded.teacher_log_probs)[valid],  # k1 estimate
            "score": graded.scores[rows],
            "teacher_entropy": graded.teacher_entropy[valid],
            "student_entropy": rollouts.student_entropy[valid],
            "response_length": rollouts.mask.sum(1)[rows],
            "truncated_ratio": ~ended[rows],
        }
        if known.any():
            values["exact_match"] = correct[known]
        for name, x in values.items():
            metrics[name + suffix] = x.float().mean().item()
    return metrics

def measure_step(run, graded, stopwatch):
    """The row of a step in metrics.jsonl: of all rollouts, the kept and the dropped."""
    keep = graded.keep
    weights = graded.weights[graded.rollouts.mask & keep[:, None]]  # [n]
    effective_size = weights.mean() ** 2 / weights.square().mean()  # 1 if all are equal
    metrics = {
        "step": run.step + 1,  # the one that was just done
        "keep_ratio": keep.float().mean().item(),
        "filter_threshold": min(graded.scores[keep].tolist(), default=math.nan),  # lowest kept
        "weight_ess": effective_size.item(),
    }
    if len(run.teachers) > 1:
        for name in run.teachers:
            own = torch.tensor([prompt.teacher == name for prompt in graded.rollouts.prompts])
            share = keep[own].float().mean()
            metrics["keep_ratio/" + name] = share.item()
    groups = {"": torch.ones_like(keep), "_kept": keep, "_dropped": ~keep}
    metrics |= averages(run, graded, groups)
    stopwatch.lap("metrics")
    metrics |= stopwatch.seconds
    seconds = sum(stopwatch.seconds.values())
    metrics["tokens_per_second"] = graded.rollouts.mask.sum().item() / seconds
    if DEVICE == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics

def evaluate(run):
    """One response to each held-out prompt, from the same random numbers in every evaluation."""
    run.evaluated = run.step
    if not run.eval_prompts:
        return
    prompts = run.eval_prompts
    rollouts = rollout(run, prompts, (run.config.seed, EVALUATE))
    teacher_log_probs, teacher_entropy = score(run, rollouts)
    scores = trajectory_scores(teacher_log_probs, rollouts.mask)
    everything = torch.ones(len(prompts), dtype=torch.bool)
    graded = Graded(rollouts, teacher_log_probs, teacher_entropy, scores, everything, None)
    groups = {"": everything}
    for domain in sorted({prompt.domain for prompt in prompts} - {""}):
        own = [prompt.domain == domain for prompt in prompts]
        groups["/" + domain] = torch.tensor(own)
    metrics = averages(run, graded, groups)
    row = {"step": run.step}
    shown = []
    for name, x in metrics.items():
        row["eval/" + name] = x
        if name.startswith(("exact_match", "reverse_kl")):
            shown.append(f"{name} {x:.3f}")
    print0(f"step {run.step}: evaluation: " + ", ".join(shown[:20]))
    log(run, row)
    write_report(run)

# --- The screen and the log ----------------------------------------------------------------------

def print0(text):
    """A line on the screen, from rank 0. A terminal that was closed does not end a run."""
    if RANK == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)

def on_terminal():
    """Whether somebody may be watching the bars. Without a console there is no stderr."""
    if RANK > 0 or sys.stderr is None:
        return False
    return sys.stderr.isatty()

def progress(label, iterable):
    """A bar for those who wait, on a terminal only."""
    return tqdm(iterable, label, leave=False, disable=not on_terminal())

def log(run, row):
    """Append a line to metrics.jsonl. JSON has no NaN: such a figure is null."""
    if RANK == 0 and run.config.steps > 0:
        for name, x in row.items():
            if not math.isfinite(x):
                row = row | {name: None}
        path = Path(run.config.output_dir, "metrics.jsonl")
        with explain(path, "make room and --resume"):
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")

def read_log(folder):
    """The rows of metrics.jsonl, in order; those of evaluations have no loss."""
    rows = []
    for line in Path(folder, "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a kill may have torn the last line
            rows.append(json.loads(line))
    return rows

def report_step(run, graded, metrics):
    """Log a step, print it, and save rollouts for the report; print some of the first and last."""
    log(run, metrics)
    print0(f"step {run.step}/{run.config.steps}: reverse_kl {metrics['reverse_kl']:.3f}, "
           f"length {metrics['response_length']:.0f}, "
           f"{metrics['tokens_per_second']:.0f} tokens/s")
    if metrics["skipped_updates"]:
        print0(f"warning: step {run.step}: no update: nothing was kept, or something is not finite")
    if RANK == 0:
        kept = graded.keep.nonzero()[:2, 0].tolist()
        dropped = (~graded.keep).nonzero()[:2, 0].tolist()
        save_examples(run, graded, kept + dropped)
        if run.step in (1, run.config.steps):
            for i in kept[:1] + dropped[:1]:
                print0(rollout_text(run, graded, i))

def verdict(graded, i):
    """What became of row i."""
    word = "kept" if graded.keep[i] else "DROPPED"
    return f"{word}, score {graded.scores[i]:.3f}"

def least_likely(run, graded, i):
    """The three tokens of row i that its teacher found least likely."""
    positions = graded.rollouts.mask[i].nonzero()[:, 0]
    log_probs = graded.teacher_log_probs[i, positions]
    tokens = []
    for j in log_probs.argsort()[:3]:
        token = run.tokenizer.decode(graded.rollouts.ids[i, positions[j]])
        tokens.append(f"{token!r} {log_probs[j]:.2f}")
    return "least likely to the teacher (log pi_T): " + ", ".join(tokens)

def rollout_text(run, graded, i):
    """Row i in a few lines."""
    rollouts = graded.rollouts
    prompt = run.tokenizer.decode(rollouts.prompts[i].ids)
    ids = rollouts.ids[i]
    response = run.tokenizer.decode(ids[rollouts.mask[i]])
    return (f"{verdict(graded, i)}: {prompt[-80:]!r} -> {response[-400:]!r}\n"
            f"    {least_likely(run, graded, i)}")

def summarize(run):
    """What changed from first to last, and the commands to type next."""
    if RANK > 0 or run.step == 0:
        return
    write_report(run)
    folder = run.config.output_dir
    rows = read_log(folder)
    print0(f"\n{'':24}{'first':>12}{'last':>12}")
    for name in [*eval_names(rows, "exact_match"), "eval/reverse_kl", "reverse_kl",
                 "keep_ratio", "response_length"]:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            print0(f"{name:24}{values[0]:12.3f}{values[-1]:12.3f}")
    quoted = shlex.quote(folder)
    program = f"python {shlex.quote(os.path.relpath(__file__))} --config {quoted}/config.json"
    newest = checkpoints(folder)[-1].name
    steps = run.config.steps
    if run.step == steps:
        steps *= 2  # all are done: as many again
    print0(f"\n{run.step} of {run.config.steps} steps, metrics in {folder}/metrics.jsonl, "
           f"curves and rollouts in {folder}/report.html. Next:\n"
           f"  go on     {program} --resume --steps {steps}\n"
           f"  evaluate  {program} --output-dir {quoted} --steps 0 --student {quoted}/{newest}\n"
           f"  use       transformers.pipeline('text-generation', '{folder}/{newest}')")

def eval_names(rows, metric):
    """The names of a held-out metric in the log: for all prompts, and for some domains."""
    first = rows[0]  # the evaluation before the run, if there is one
    names = [name for name in first if name.startswith("eval/" + metric)]
    return names[:7]

# --- report.html: curves, scores and rollouts, in one page without a script ----------------------

PAGE = """<!doctype html>
<html><head><meta charset="utf-8"/><title>{title}</title>
<meta name="viewport" content="width=device-width"/>
<meta name="color-scheme" content="light dark"/><style>
.fire-opd {{ font: 15px/1.6 sans-serif; max-width: 62em; margin: 1em auto; padding: 0 1em }}
.fire-opd figure {{ display: inline-block; width: min(100%, 29em); margin: 0 1em 1em 0 }}
.fire-opd svg {{ width: 100% }}
.fire-opd text {{ font-size: 11px; fill: currentColor }}
.fire-opd p {{ overflow-wrap: anywhere }}
</style></head><body><div class="fire-opd"><h2>{title}</h2>
{body}
</div></body></html>
"""
LEGEND = """<p>A token's shade is its weight:
<span style="background:rgba(255,140,0,0.6)">more than 1</span>,
<span style="background:rgba(70,130,255,0.6)">less than 1</span>;
its figures appear under the mouse.</p>
"""
COLORS = ["#3b82f6", "#16a34a", "#dc2626", "#d97706", "#9333ea", "#0891b2", "#65a30d"]

def scaled(value, low, high, start, end):
    """Where a value lies on an axis that shows `low` at pixel `start` and `high` at `end`."""
    share = (value - low) / (high - low + 1e-9)
    return round(start + share * (end - start), 1)

def chart(rows, names):
    """Some metrics over the steps, with axes and the last values. -> HTML"""
    curves = {}
    heights = [0]
    for name in names:
        points = []
        for row in rows:
            if row.get(name) is not None:
                points.append((row["step"], row[name]))
        if points:
            every = len(points) // 300 + 1  # some 300 points are enough
            curves[name] = points[::every] + points[-1:]
            heights += [y for x, y in points]
    if not curves:
        return ""
    low, high = min(heights), max(heights)
    last = rows[-1]["step"]
    legend, lines = "", ""
    for color, (name, points) in zip(COLORS, curves.items()):
        places = ""
        for x, y in points:
            places += f"{scaled(x, 0, last, 50, 390)},{scaled(y, low, high, 150, 10)} "
        lines += f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{places}"/>'
        legend += f' <b style="color:{color}">{html.escape(name)} {points[-1][1]:.3f}</b>'
    return (f'<figure><figcaption>{legend}</figcaption><svg viewBox="0 0 400 175">{lines}'
            f'<path d="M50,10 V150 H390" fill="none" stroke="currentColor"/>'
            f'<text x="46" y="15" text-anchor="end">{high:.3g}</text>'
            f'<text x="46" y="150" text-anchor="end">{low:.3g}</text><text x="50" y="166">0</text>'
            f'<text x="390" y="166" text-anchor="end">step {last}</text></svg></figure>\n')

def score_strip(graded):
    """The scores of one step as dots, a row for each domain, and a line at the lowest that was
    kept. -> HTML"""
    prompts = graded.rollouts.prompts
    domains = sorted({prompt.domain for prompt in prompts})[:6]
    scores = graded.scores.tolist()
    finite = [score for score in scores if math.isfinite(score)]
    low = min(finite, default=0)
    high = max(finite, default=0)
    bottom = 22 * len(domains)
    marks = ""
    for line, domain in enumerate(domains):
        y = 22 * line + 10
        marks += f'<text x="0" y="{y + 6}">{html.escape(domain[:8])}</text>'
        for i, prompt in enumerate(prompts):
            if prompt.domain == domain and math.isfinite(scores[i]):
                x = scaled(scores[i], low, high, 60, 690)
                color = COLORS[2]
                if graded.keep[i]:
                    color = COLORS[1]
                spread = i % 5  # so that fewer dots hide each other
                marks += (f'<circle cx="{x}" cy="{y + spread}" r="4" fill="{color}" '
                          'fill-opacity="0.5"/>')
    lowest = min(graded.scores[graded.keep].tolist(), default=high)
    x = scaled(lowest, low, high, 60, 690)
    return (f'<p>Scores from {low:.2f} to {high:.2f}, <b style="color:{COLORS[1]}">kept</b> and '
            f'<b style="color:{COLORS[2]}">dropped</b>; the lowest that was kept is '
            f'{lowest:.3f}</p><svg viewBox="0 0 700 {bottom}">{marks}'
            f'<path d="M{x},0 V{bottom}" stroke="currentColor"/></svg>\n')

def rollout_html(run, graded, i):
    """Row i: prompt and tokens, shaded by how far their weight is from 1. -> HTML"""
    rollouts = graded.rollouts
    prompt = run.tokenizer.decode(rollouts.prompts[i].ids)[-300:]
    positions = rollouts.mask[i].nonzero()[:, 0].tolist()
    tokens = ""
    for t in positions[:300]:
        weight = graded.weights[i, t].item()
        shade = "none"
        if graded.keep[i]:
            color = "255,140,0" if weight > 1 else "70,130,255"
            shade = f"rgba({color},{min(0.9, 1.5 * abs(weight - 1)):.2f})"
        title = (f"log pi_T {graded.teacher_log_probs[i, t]:.2f}, "
                 f"log pi_S {rollouts.log_probs[i, t]:.2f}, "
                 f"H_T {graded.teacher_entropy[i, t]:.2f}, "
                 f"H_S {rollouts.student_entropy[i, t]:.2f}, w {weight:.2f}")
        text = html.escape(run.tokenizer.decode(rollouts.ids[i, t]))
        tokens += f'<span style="background:{shade}" title="{title}">{text}</span>'
    if len(positions) > 300:
        tokens += f" ... and {len(positions) - 300} more tokens"
    return (f"<p><b>{verdict(graded, i)}</b><br/>"
            f'<span style="opacity:0.65">{html.escape(prompt)}</span> {tokens}<br/>'
            f"<small>{html.escape(least_likely(run, graded, i))}</small></p>\n")

def save_examples(run, graded, rows):
    """The scores of this step and some of its rollouts, for the report, in a file of their own."""
    text = f"<h3>Step {run.step}</h3>\n{score_strip(graded)}"
    for i in rows:
        text += rollout_html(run, graded, i)
    name = "first_step.html" if run.step == 1 else "last_step.html"
    write_text(Path(run.config.output_dir, name), text)

def write_text(path, text):
    """Write a file under another name and rename it, so that it is never seen half written."""
    with explain(path, "make room and --resume"):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)

def write_report(run):
    """report.html: the curves of the log, then scores and rollouts of the first and last step."""
    folder = Path(run.config.output_dir)
    if RANK > 0 or run.config.steps == 0:
        return
    rows = read_log(folder)
    body = ""
    for names in (eval_names(rows, "exact_match"), eval_names(rows, "reverse_kl"),
                  ["reverse_kl", "reverse_kl_kept", "reverse_kl_dropped"],
                  ["keep_ratio"], ["filter_threshold"], ["response_length"]):
        body += chart(rows, names)
    body += LEGEND
    for path in sorted(folder.glob("*_step.html")):  # the first, then the last
        body += path.read_text(encoding="utf-8")
    changed = {}
    for name, value in vars(run.settings).items():
        if name != "tiny" and value != getattr(Config(), name):
            changed[name] = value
    command = shlex.join(["python", "fire_opd.py", *as_flags(changed)])
    body += f"<p>The run, without defaults: <code>{html.escape(command)}</code></p>"
    title = f"FiRe-OPD: {html.escape(folder.name)}, step {run.step}"
    write_text(folder / "report.html", PAGE.format(title=title, body=body))

# --- Prompts -------------------------------------------------------------------------------------

# The columns that are read; "group" is the old name of "domain".
COLUMNS = ("prompt", "problem", "question", "messages", "answer", "ground_truth", "solution",
           "teacher", "domain", "group", "tools")

def text_of(content):
    """The text of a message's content, which other tools write as a list of parts."""
    if isinstance(content, list):
        for part in content:
            if part["type"] != "text":
                raise ValueError(f"a part of type {part['type']!r} is not supported, only text")
        return "".join(part["text"] for part in content)
    return content

def tokenize(prompt, tokenizer, config, tools=None):
    """The ids of a prompt, a string or a list of messages, as the chat template renders it."""
    if config.chat_template == "none" or not tokenizer.chat_template:
        if tools or not isinstance(prompt, str):
            raise ValueError("tools and lists of messages need a chat template")
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        if ids[:2] == [tokenizer.bos_token_id] * 2:  # one of the text, one of the tokenizer
            ids = ids[1:]
        if ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # the tokenizer's: but the student is to go on
        return ids
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if messages[-1]["role"] == "assistant":  # a row of a fine-tuning set, with its reply
        messages = messages[:-1]
    rendered = []
    for message in messages:
        text = text_of(message.get("content"))
        rendered.append(message | {"content": text})
    return tokenizer.apply_chat_template(
        rendered, tools=tools, add_generation_prompt=True, return_dict=False,
        enable_thinking=config.enable_thinking)

def without_nulls(pairs):
    """A JSON object without nulls, which some data sets write for what a row or a tool lacks."""
    return {key: value for key, value in pairs if value is not None}

def first_of(row, *keys):
    """The value of the first of these keys that a row has, or None."""
    for key in keys:
        if row.get(key) not in (None, "", []):
            return row[key]
    return None

def parse_prompt(row, tokenizer, config, vocabulary, teachers):
    """A row of a prompt file -> Prompt; a ValueError says what is wrong with it."""
    for key in ("messages", "tools"):
        if isinstance(row.get(key), str):  # some data sets keep them as a string of JSON
            row[key] = json.loads(row[key])
    content = first_of(row, "prompt", "problem", "question", "messages")
    answer = first_of(row, "answer", "ground_truth", "solution")
    domain = first_of(row, "domain", "group")
    teacher = row.get("teacher")
    if teacher is None and len(teachers) == 1:
        teacher = teachers[0]
    if not isinstance(content, (str, list)):
        raise ValueError("no prompt: give 'prompt' (a string or messages) or 'problem'")
    if isinstance(answer, (bool, dict, list)):
        raise ValueError(f"'answer' must be a string or a number, got {str(answer)[:60]}")
    if teacher not in teachers:
        raise ValueError(f"teacher {teacher!r} is not one of {', '.join(teachers)}: "
                         "give --teacher NAME=PATH")
    ids = list(tokenize(content, tokenizer, config, first_of(row, "tools")))
    unknown = sorted(set(ids) - vocabulary)
    if unknown:
        names = tokenizer.convert_ids_to_tokens(unknown[:3])
        raise ValueError(f"its tokens {names} are not known to all models")
    if not ids:
        raise ValueError("the prompt has no tokens")
    if answer is not None:
        answer = str(answer)
    if domain is None:
        domain = ""
    return Prompt(ids, answer, teacher, str(domain))

def squeezed(text):
    """Text without what a tokenizer may change: case, runs of spaces, Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

def is_lost(row, ids, tokenizer):
    """Whether a row's text is not in its tokens: a template or a tokenizer may lose it."""
    text = first_of(row, "prompt", "problem", "question", "messages")
    if isinstance(text, list):
        users = [message for message in text if message.get("role") == "user"]
        text = ""
        if users:
            text = text_of(users[-1].get("content"))
    return squeezed(text) not in squeezed(tokenizer.decode(ids))

def load_prompts(path, tokenizer, config, vocabulary, teachers):
    """The prompts of a JSON Lines file; those that are too long are dropped, and counted."""
    if not path:
        return []
    prompts, unread, lost = [], set(), []
    with explain(path, "give a JSON Lines file"):
        lines = Path(path).read_bytes().split(b"\n")  # splitlines() would split at U+2028, too
    for number, line in enumerate(progress(path, lines), 1):
        with explain(f"{path} line {number}", "each line must be a JSON object with a prompt"):
            if not line.strip():
                continue
            row = json.loads(line, object_pairs_hook=without_nulls)
            if not isinstance(row, dict):
                raise ValueError(f"not an object: {line[:60]}")
            prompts.append(parse_prompt(row, tokenizer, config, vocabulary, teachers))
            unread |= row.keys() - set(COLUMNS)
            if is_lost(row, prompts[-1].ids, tokenizer):
                lost.append(number)
    kept = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    if len(kept) < WORLD_SIZE:
        raise UserError(f"{path}: of {len(prompts)} prompts {len(kept)} have at most "
                        f"--max-prompt-tokens {config.max_prompt_tokens}; raise it or add prompts")
    if len(lost) > len(prompts) / 2:
        raise UserError(f"{path} line {lost[0]} and {len(lost) - 1} more: the prompt's text is not "
                        "in its tokens; its chat template or tokenizer loses it, try another")
    print0(f"{path}: {len(kept)} prompts of at most {config.max_prompt_tokens} tokens")
    if len(kept) < len(prompts):
        print0(f"warning: {path}: {len(prompts) - len(kept)} longer prompts are dropped")
    if lost:
        print0(f"warning: {path}: lines that lose some of their text as tokens: {lost}")
    if unread:
        print0(f"warning: {path}: columns that are not read: {sorted(unread)}")
    return kept

# --- Models --------------------------------------------------------------------------------------

@dataclass
class Source:
    """A checkpoint before its weights are loaded."""
    name: str  # student, or the teacher's
    folder: Path
    config: object
    tokenizer: object

def teacher_paths(config):
    """["math=PATH", "code=PATH"] -> {"math": PATH, "code": PATH}; a lone PATH is "teacher"."""
    paths = {}
    for entry in config.teacher:
        name, path = "teacher", entry
        named = re.fullmatch(r"([\w-]+)=(.+)", entry)
        if named and not os.path.isdir(entry):
            name, path = named.groups()
        if name in paths or name == "student":
            raise UserError(f"--teacher {entry}: give each teacher a NAME=PATH of its own")
        paths[name] = path
    return paths

def open_source(name, path):
    """A folder, or a name on the hub; what cannot be supported is refused. -> Source"""
    folder = Path(path)
    if not folder.is_dir():
        with explain(f"{name} {path}",
                     "no such folder; give one, or a hub name such as Qwen/Qwen3-0.6B"):
            # What transformers would load: no other formats, no copy of the weights in a subfolder.
            folder = Path(huggingface_hub.snapshot_download(
                str(path), etag_timeout=5, ignore_patterns=["*/*", "consolidated*"],
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    with explain(f"{name} {path}", "give a complete checkpoint folder, tokenizer included"):
        if (folder / "adapter_config.json").exists():
            raise ValueError("this is a LoRA adapter: merge it into its base model")
        options = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling",
                    "lm_head_multiplier"):
            if getattr(config.get_text_config(), key, None) not in (None, 1):
                raise ValueError(f"its {key} is not supported: logits must be hidden @ W.T")
    return Source(name, folder, config, tokenizer)

def check_positions(source, longest):
    """Whether the model has as many positions as the longest prompt and response need."""
    config = source.config.get_text_config()
    limit = getattr(config, "max_seq_len", math.inf)
    limit = getattr(config, "max_position_embeddings", limit)
    rope = rope_parameters(config)
    for parameters in [rope] + list(rope.values()):  # some models have one for each type of layer
        if isinstance(parameters, dict):
            original = parameters.get("original_max_position_embeddings") or limit
            if parameters.get("rope_type") == "yarn":
                limit = int(parameters["factor"] * original)
            elif parameters.get("rope_type") in ("longrope", "dynamic"):
                limit = original  # beyond it, a batch's longest row would change the others
    if longest > limit:
        raise UserError(f"{source.name} {source.folder}: prompt and response may take {longest} "
                        f"tokens, its positions end at {limit}; lower --max-new-tokens or "
                        "--max-prompt-tokens")

def tokens_by_id(source):
    """{id: token} of a tokenizer's whole vocabulary."""
    vocabulary = source.tokenizer.get_vocab()
    return {i: token for token, i in vocabulary.items()}

def shared_vocabulary(student, teachers):
    """The ids that every model has an embedding of, and that are the same token to all of them.

    Compared id by id: that embeddings are equally wide proves nothing, since they are padded.
    """
    ours = tokens_by_id(student)
    shared = set(ours)
    for source in [student] + teachers:
        theirs = tokens_by_id(source)
        rows = source.config.get_text_config().vocab_size
        shared = {i for i in shared & theirs.keys() if i < rows}
        differ = {i for i in shared if theirs[i] != ours[i]}
        # A reserved token of another name is no mistake: it is left out, and never sampled.
        wrong = sorted(differ - source.tokenizer.added_tokens_decoder.keys())
        if wrong or not shared:
            examples = [(i, ours[i], theirs[i]) for i in wrong[:2]]
            raise UserError(f"teacher {source.name}: {len(wrong)} of the student's {len(ours)} ids "
                            f"differ: {examples}; choose a pair that shares them")
        shared -= differ
    print0(f"vocabulary: {len(shared)} ids are sampled and graded")
    if len(shared) < len(ours):
        print0(f"warning: vocabulary: {len(ours) - len(shared)} ids of the student are left out: "
               "without an embedding, unknown to a teacher, or of another name there")
    return shared

def end_ids(model, tokenizer, config):
    """What ends a response: the checkpoint's ids, and the chat template's end of turn."""
    ids = set()
    for holder in (model.generation_config, model.config, tokenizer):
        listed = getattr(holder, "eos_token_id", None)
        if not isinstance(listed, list):
            listed = [listed]
        ids.update(listed)
    if tokenizer.chat_template and config.chat_template == "auto":
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@reply@"}]
        with contextlib.suppress(Exception):  # some templates cannot show a reply
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            tail = text.split("@reply@")[-1].lstrip()
            first = tokenizer(tail, add_special_tokens=False)["input_ids"][0]
            if first in tokenizer.all_special_ids or first in tokenizer.added_tokens_decoder:
                ids.add(first)
    return ids - {None}

def load_model(source, dtype):
    """A causal LM on the CPU: complete, frozen, in eval mode. With dropout, the policy that is
    trained would be another than the one that wrote the rollouts."""
    model, info = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=dtype, use_safetensors=True, local_files_only=True,
        trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
    broken = list(info["missing_keys"]) + list(info["mismatched_keys"])
    if broken:
        raise ValueError(f"{len(broken)} weights are missing or of another shape, such as "
                         f"{sorted(map(str, broken))[0]}")
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no inner model: not supported")
    return model.requires_grad_(False).eval()

def load_policy(source, config, vocabulary):
    """The student or a teacher, on its device. -> Policy"""
    # The ranks of a node take turns, so that its memory never holds a large model twice.
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))):
        if turn == LOCAL_RANK:
            policy = make_policy(source, config, vocabulary)
        barrier()
    print0(f"{source.name}: {policy.model.num_parameters():,} parameters, "
           f"end of sequence: {sorted(policy.eos_ids)}")
    if not policy.eos_ids:
        print0(f"warning: {source.name} has no end of sequence: responses end at --max-new-tokens")
    return policy

def make_policy(source, config, vocabulary):
    """Load it, prepare what is trained, shard it if wanted, and move it. -> Policy"""
    is_student = source.name == "student"
    dtype = compute_dtype(config)
    if is_student:
        dtype = torch.float32  # an AdamW step of 1e-6 would vanish in the rounding of bfloat16
    with explain(f"{source.name} {source.folder}", "give a safetensors causal LM"):
        model = load_model(source, dtype)
        ends = end_ids(model, source.tokenizer, config)
        if is_student and not ends <= vocabulary:
            raise ValueError(f"its end of sequence {sorted(ends)} is not in the vocabulary that it "
                             "shares with its teachers")
        # Some can be read, but not saved: checkpoints take the file itself along instead.
        model.generation_config = transformers.GenerationConfig()
        policy = Policy(model, ends, vocabulary, config)
    if is_student:
        prepare_student(model, config)
        # A graph with FSDP's gathers is untested; teachers do not write, but for the self-test.
        policy.use_cuda_graph = DEVICE == "cuda" and not is_sharded(config)
    if is_sharded(config):
        apply_fsdp(policy, is_student)
    return policy.to(DEVICE)

def compute_dtype(config):
    """The dtype of the teachers' weights, and of a student's matrix products."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if DEVICE == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32

def is_sharded(config):
    """Whether FSDP is on: one rank has nobody to share with."""
    return config.shard and WORLD_SIZE > 1

def blocks(model):
    """The transformer blocks of the text model."""
    modules = model.get_decoder().modules()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

def prepare_student(model, config):
    """Unfreeze what is trained; recompute activations if that is wanted."""
    # Not a vision tower: it gets no gradient from text, and DDP would wait for it.
    model.get_decoder().requires_grad_()
    model.get_output_embeddings().requires_grad_()
    if config.gradient_checkpointing:
        for block in blocks(model):
            block.forward = functools.partial(recomputed, block.forward)

def recomputed(forward, *args, **kwargs):
    """Gradient checkpointing of a block; transformers' own would need training mode."""
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)

def apply_fsdp(policy, is_student):
    """FSDP2. A teacher's block is gathered when it runs. The student is gathered at its first
    sampled token and stays whole until a backward pass: that takes memory, but to gather it for
    every token would take far too long."""
    precision = MixedPrecisionPolicy()
    if is_student and policy.autocast_to_bf16:  # inputs stay: uniforms in bf16 could become 1
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # The policy comes last and takes what is left: its head may be tied to its embedding.
    for module in blocks(policy.model) + [policy]:
        fully_shard(module, reshard_after_forward=not is_student, mp_policy=precision)
    register_fsdp_forward_method(policy, "sample")

def load(settings):
    """Everything a run needs; what is cheap to check comes first. -> Run"""
    config = settings
    if settings.tiny:
        config = make_tiny(settings)
    newest = newest_checkpoint(config)
    student = open_source("student", newest or config.student)
    paths = teacher_paths(config)  # {name: path}
    names = list(paths)
    teachers = [open_source(name, paths[name]) for name in names]
    vocabulary = shared_vocabulary(student, teachers)
    prompts = load_prompts(config.prompts, student.tokenizer, config, vocabulary, names)
    held_out = load_prompts(config.eval_prompts, student.tokenizer, config, vocabulary, names)
    print0(f"first prompt: {student.tokenizer.decode(prompts[0].ids)!r}")
    longest = max(len(prompt.ids) for prompt in prompts + held_out) + config.max_new_tokens
    for source in [student] + teachers:
        check_positions(source, longest)
    check_output(settings)
    policy = load_policy(student, config, vocabulary)
    trained, optimizer = prepare_training(policy, config)
    run = Run(settings, config, student.tokenizer, prompts, held_out, policy, trained, optimizer,
              files_to_export(student, policy))
    if newest:
        resume(run, newest)
    warm_up_ddp(run)
    for source in teachers:
        run.teachers[source.name] = load_policy(source, config, vocabulary)
        if run.teachers[source.name].eos_ids != policy.eos_ids:
            print0(f"warning: {source.name} and the student differ in their end of sequence; "
                   "rollouts end with the student's, so their length may drift")
    self_test(run)  # after the optimizer is restored: a forward leaves a sharded student whole
    claim_output(settings, newest)
    return run

def warm_up_ddp(run):
    """Two backward passes of zeros. DDP lays out its buckets in its first two, and rounds
    differently there: a resumed run would differ from one that went on."""
    if run.trained is not run.student:
        nothing = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
        for _ in range(2):
            log_probs, _ = run.trained(nothing, nothing > 0)
            log_probs.sum().backward()
        run.optimizer.zero_grad(set_to_none=False)

@torch.no_grad()
def self_test(run):
    """Scoring (our head, no cache, padding on the right) must give the log-probs of sampling
    (transformers' own forward, with a cache and padding on the left). They differ if a model
    scales its logits, or if positions or mask are wrong."""
    config = run.config
    if config.compile:
        print0("compiling scoring and update: a minute, once")
    by_length = sorted(run.prompts, key=lambda prompt: len(prompt.ids))
    prompts = by_length[:4] + by_length[-4:]
    width = min(16, config.max_new_tokens)
    uniforms = stateless_uniforms((config.seed, EVALUATE), range(len(prompts)), width)
    policies = {"student": run.student} | run.teachers
    for name, policy in policies.items():
        with explain(f"self-test of {name}", "such a model, or --compile here, is not supported"):
            sampled = policy.sample([prompt.ids for prompt in prompts], uniforms)
            r = lay_out(prompts, policy.eos_ids, *sampled)
            scored, _ = policy(r.ids.to(DEVICE), r.mask.to(DEVICE))  # [8, L]
            gap = (scored.cpu() - r.log_probs)[r.mask]
            gap = gap.abs().mean().item()
            limit = 1e-4  # of rounding
            if policy.autocast_to_bf16:
                limit = 0.2
            if not gap < limit / min(1, config.temperature):  # so that NaN fails, too
                raise ValueError(f"log-probs of scoring and sampling are {gap:.1e} apart: it "
                                 "scales or caps its logits, sees padding, or has NaN weights")
        print0(f"self-test of {name}: log-probs of scoring and sampling are {gap:.1e} apart")

# --- The run's folder and its checkpoints --------------------------------------------------------

MAY_CHANGE = ("steps", "eval_every", "save_every", "keep", "rollout_batch_size", "compile",
              "micro_batch_tokens", "gradient_checkpointing", "shard")  # on resume
# States are whole, and on the CPU of rank 0. Not strict: some weights may never get a gradient.
STATE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)

def checkpoints(folder):
    """Oldest first. Only a complete one ever has this name."""
    return sorted(Path(folder).glob("checkpoint-" + "[0-9]" * 6))

def newest_checkpoint(config):
    """The one to resume, or None. Rank 0 looks: others may see a shared disk later."""
    newest = None
    if RANK == 0 and config.resume:
        newest = max(checkpoints(config.output_dir), default=None)
    return broadcast(newest)

def check_output(settings):
    """Whether a run may start, or go on, in its folder; before anything slow."""
    folder = Path(settings.output_dir)
    if RANK == 0 and settings.steps > 0:
        with explain(f"output folder {folder}", "choose another --output-dir"):
            if settings.resume and (folder / "config.json").exists():
                check_same_settings(folder, settings)
            elif checkpoints(folder) or (folder / "config.json").exists():
                raise ValueError("it holds a run; continue it with --resume")
        with explain(f"output folder {folder}: a checkpoint cannot be saved there",
                     "choose another --output-dir, where folders can be written and renamed"):
            with complete_folder(folder / "trial"):
                pass
            (folder / "trial").rmdir()
    barrier()

def claim_output(settings, newest):
    """Write config.json and an empty log, now that the run is ready; fails if another was first."""
    folder = Path(settings.output_dir)
    if RANK == 0 and settings.steps > 0:
        with explain(f"output folder {folder}", "choose another --output-dir"):
            if not (settings.resume and (folder / "config.json").exists()):
                with (folder / "config.json").open("x") as file:  # "x": it must not exist
                    json.dump(to_save(settings), file, indent=1)
            if newest is None:
                (folder / "metrics.jsonl").write_text("")
            for stale in folder.glob("*.partial/"):  # of a run that was killed
                shutil.rmtree(stale, ignore_errors=True)
    barrier()

def to_save(settings):
    """The settings for config.json, without its own place: the folder may be moved."""
    record = dict(vars(settings))
    for name in ("config", "resume", "output_dir"):
        del record[name]
    return record

def check_same_settings(folder, settings):
    """A resumed run goes on with its own settings."""
    # A setting that did not exist when the run was started had its default.
    before = vars(Config()) | json.loads((folder / "config.json").read_text())
    for name, value in to_save(settings).items():
        if name not in MAY_CHANGE and before[name] != value:
            raise ValueError(f"{name} was {before[name]!r}, is {value!r}; only "
                             f"{', '.join(MAY_CHANGE)} may change")

@contextlib.contextmanager
def complete_folder(folder):
    """Gives a temporary folder to fill, which gets the name `folder` when all of it is on the disk:
    no kill leaves half of one."""
    temporary = folder.with_name(f"{folder.name}-{secrets.token_hex(2)}.partial")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # as readable as the folder: safetensors' are not
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        temporary.rename(folder)  # which a bucket that is mounted as a folder may refuse
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # it would keep a full disk full
        raise

def files_to_export(source, policy):
    """The student's small files, for its checkpoints: as they are, so that older versions of
    transformers read them too, but for eos_token_id. {name: bytes}"""
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack",
               ".onnx")
    files = {}
    for path in source.folder.iterdir():
        if path.is_file() and not path.name.endswith(weights):
            files[path.name] = path.read_bytes()
    with explain(f"student {source.folder}", "mend its generation_config.json"):
        generation = json.loads(files.get("generation_config.json", "{}"))
    generation["eos_token_id"] = sorted(policy.eos_ids)  # so that others stop where rollouts did
    files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    return files

def save_checkpoint(run):
    """The weights in float32 and AdamW's two moments, 12 bytes a parameter, and the student's own
    files. The order of prompts and all random numbers follow from the step."""
    model = run.student.model
    folder = Path(run.config.output_dir, f"checkpoint-{run.step:06d}")
    weights = dcp.get_model_state_dict(model, options=STATE)  # collective: rank 0 gets it all
    moments = {}
    if run.optimizer.state:  # before the first update there is none, and asking would make one
        moments = dcp.get_optimizer_state_dict(run.trained, run.optimizer, options=STATE)
    if RANK == 0 and not folder.exists():
        names = dict(model.named_parameters()) | dict(model.named_buffers())
        for name in weights.keys() - names.keys():  # a tied head, which is the embedding
            del weights[name]
        with explain(f"checkpoint {folder}",
                     "make room and --resume: the last complete one is intact"):
            with complete_folder(folder) as temporary:
                model.save_pretrained(temporary, state_dict=weights)
                for name, content in run.files.items():
                    (temporary / name).write_bytes(content)
                torch.save(moments, temporary / "optimizer.pt")  # .safetensors are for weights
            for old in checkpoints(folder.parent)[:-run.config.keep]:
                gone = old.rename(f"{old}.partial")  # half deleted it must not look complete
                shutil.rmtree(gone, ignore_errors=True)
    barrier()

def resume(run, folder):
    """Restore step and optimizer, and cut the log back; `load` has read the weights."""
    run.step = int(folder.name[-6:])
    with explain(f"checkpoint {folder}", "remove this folder to continue the one before it"):
        moments = torch.load(folder / "optimizer.pt", weights_only=True, mmap=True)
        if moments:
            dcp.set_optimizer_state_dict(run.trained, run.optimizer, moments, options=STATE)
    if RANK == 0:
        path = folder.with_name("metrics.jsonl")
        with explain(path, "it must be the log of the run to continue"):
            rows = read_log(folder.parent)
            rows = [row for row in rows if row["step"] <= run.step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            if "loss" not in row:
                run.evaluated = row["step"]
    run.evaluated = broadcast(run.evaluated)

# --- The tiny pair: a teacher and a student made in seconds --------------------------------------

def tiny_tokenizer():
    """One token a character."""
    characters = list("0123456789+,=") + ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")

def tiny_rows(rng, count, digits, mixture):
    """The running sum mod 10 ("+") or maximum (",") of digits. A slip makes later digits wrong."""
    shares = list(mixture.values())
    domains = rng.choice(list(mixture), count, p=shares)
    for domain in domains.tolist():
        numbers = rng.integers(0, 10, digits)
        if domain == "+":
            answer = np.cumsum(numbers) % 10
        else:
            answer = np.maximum.accumulate(numbers)
        prompt = "".join(map(str, numbers)) + domain + "="
        answer = "".join(map(str, answer))
        yield {"prompt": prompt, "answer": answer, "domain": domain}

def even_mixture(domains):
    """{domain: share}, all shares alike."""
    return {domain: 1 / len(domains) for domain in domains}

def pretrain(name, tiny, seed):
    """Train a model of the pair on its domains until the smoothed loss is low."""
    kind = "student" if name == "student" else "teacher"
    target_loss = tiny[kind + "_loss"]
    torch.manual_seed(seed)
    rng = default_rng((seed, PRETRAIN, *name.encode()))
    tokenizer = tiny_tokenizer()
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **tiny[kind]))
    optimizer = torch.optim.AdamW(
        model.parameters(), tiny["pretrain_lr"], weight_decay=0.0, fused=True)
    mixture = even_mixture(tiny["models"][name])
    smooth = None
    for step in progress(f"training the tiny {name}", range(tiny["pretrain_steps"])):
        rows = tiny_rows(rng, 128, tiny["digits"], mixture)
        texts = [row["prompt"] + row["answer"] + "<eos>" for row in rows]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # [128, 2 digits + 3]
        labels = ids.clone()
        labels[:, :tiny["digits"] + 2] = -100  # the prompt is not learned
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.8 * smooth + 0.2 * loss.item()
        if smooth < target_loss:
            break
    print0(f"the tiny {name}: {model.num_parameters():,} parameters, loss {smooth:.3f} after "
           f"{step + 1} steps")
    if smooth >= target_loss:
        print0(f"warning: it was to reach {target_loss}: it has not learned; try another --seed")
    return model

def make_tiny(settings):
    """Make the pair, once for an output folder. -> the settings of a run on it"""
    folder = Path(settings.output_dir, f"tiny-{settings.task}-{settings.seed}")
    torch.set_num_threads(1)  # two are slower for so small a pair
    with explain(f"task {settings.task}", f"mend tiny in {settings.config}"):
        tiny = settings.tiny | settings.tiny["tasks"][settings.task]  # a task's own student wins
        if RANK == 0 and not folder.exists():
            with complete_folder(folder) as temporary:
                write_tiny(temporary, tiny, settings.seed)
    barrier()
    teachers = [f"{name}={folder}/{name}" for name in tiny["models"] if name != "student"]
    return dataclasses.replace(
        settings, teacher=teachers, student=settings.student or f"{folder}/student",
        prompts=f"{folder}/prompts.jsonl", eval_prompts=f"{folder}/eval_prompts.jsonl")

def write_tiny(folder, tiny, seed):
    """Its models, each trained on its domains, and its prompts."""
    for name in tiny["models"]:
        model = pretrain(name, tiny, seed)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    rng = default_rng((seed, ORDER))
    mixture = tiny["mixture"]  # {domain: share}
    files = [("prompts", 4096, mixture), ("eval_prompts", 512, even_mixture(mixture))]
    for name, count, shares in files:
        with open(folder / f"{name}.jsonl", "w") as file:
            for row in tiny_rows(rng, count, tiny["digits"], shares):
                row["teacher"] = tiny["graded_by"][row["domain"]]
                file.write(json.dumps(row) + "\n")

# --- The command ---------------------------------------------------------------------------------

def ask_to_stop(number, frame):
    """Stop after this step; a second Ctrl-C stops at once."""
    if STOP.is_set() and number == signal.SIGINT:
        raise KeyboardInterrupt
    STOP.set()
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

@contextlib.contextmanager
def guest():
    """Take signals over, and leave all as it was afterwards: the process may be a notebook's."""
    STOP.clear()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # Windows has the first two
            if hasattr(signal, name):
                number = getattr(signal, name)
                ignored = signal.getsignal(number) == signal.SIG_IGN  # as nohup does
                if name == "SIGTERM" or not ignored:
                    handlers[number] = signal.signal(number, ask_to_stop)
    threads = torch.get_num_threads()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    # cuDNN's attention takes 23 to 37 ms to plan for each new length, and most calls have one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)

def start_ranks(config):
    """Device and ranks, and a name for the output folder where none was given."""
    if DEVICE == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        backend = "gloo"
        if DEVICE == "cuda":
            backend = "cpu:gloo,cuda:nccl"
        # Ranks wait for each other's longest rollouts, and for a checkpoint to be written.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
    if not config.output_dir:
        # With some random letters: runs that are started together get a folder each.
        name = time.strftime("runs/%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        config.output_dir = broadcast(name)

def main(argv=()):
    """The command: main(["--steps", "5"]) is `python fire_opd.py --steps 5`.

    Raises SystemExit: 130 if it was told to stop, 2 after a user's mistake, which is one line.
    """
    message = ""
    try:
        with guest():
            config = parse_config(argv)
            start_ranks(config)
            finished = train(config)
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = ("out of GPU memory; lower --micro-batch-tokens or --rollout-batch-size, "
                   "or add --gradient-checkpointing or --shard")
    if message:
        message = " ".join(message.split())[:900]
        sys.stderr.write(f"error: {message}\n")  # in one piece, as other ranks may write too
        raise SystemExit(2)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if not finished:
        raise SystemExit(130)

def run_as_script():
    """Run main and exit with its status; with several ranks, without waiting for the others."""
    # Launchers send SIGTERM more than once, and one that comes after the run must not change its
    # status. During the run, guest() handles it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if not on_terminal():
        transformers.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="backslashreplace")  # responses may hold any character
    status = 0
    try:
        main(sys.argv[1:])
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    if WORLD_SIZE > 1:
        os._exit(status)
    sys.exit(status)

if __name__ == "__main__":
    run_as_script()
