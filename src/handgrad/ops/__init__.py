"""The ops: one folder each, with math, oracle, kernels, gradient rule and cases. `OPS` is the table of all."""

from handgrad.ops.adafactor.op import adafactor
from handgrad.ops.adamw.op import adamw, adamw_bf16, adamw_int8
from handgrad.ops.add.op import add
from handgrad.ops.add_norm.op import add_norm, add_rms_norm, norm, norm_backward, rms_norm, rms_norm_backward
from handgrad.ops.attention.op import attention, attention_backward
from handgrad.ops.attention_decode.op import attention_decode
from handgrad.ops.cap_logits.op import cap_logits
from handgrad.ops.dropout.op import dropout
from handgrad.ops.ema.op import ema
from handgrad.ops.embed.op import embed, embed_backward
from handgrad.ops.fill.op import fill
from handgrad.ops.gated.op import gated, gated_backward
from handgrad.ops.global_norm.op import global_norm
from handgrad.ops.linear.op import linear, linear_act, linear_act_backward, linear_backward_w, linear_backward_x
from handgrad.ops.lion.op import lion
from handgrad.ops.lm_loss.op import lm_loss, lm_loss_forward_backward
from handgrad.ops.lora.op import lora, lora_backward
from handgrad.ops.loss_sum.op import loss_sum
from handgrad.ops.muon.op import muon, muon_momentum
from handgrad.ops.pick.op import pick, pick_backward
from handgrad.ops.rms.op import rms, rms_of_ranks
from handgrad.ops.rope.op import rope, rope_backward
from handgrad.ops.schedule_free.op import schedule_free, schedule_free_average, schedule_free_count
from handgrad.ops.sgd.op import sgd
from handgrad.ops.share_norm.op import share_norm
from handgrad.ops.squared_error.op import squared_error, squared_error_forward_backward

_ALL = (
    embed,
    embed_backward,
    linear,
    linear_act,
    linear_act_backward,
    linear_backward_w,
    linear_backward_x,
    lora,
    lora_backward,
    gated,
    gated_backward,
    norm,
    add_norm,
    norm_backward,
    rms_norm,
    add_rms_norm,
    rms_norm_backward,
    attention,
    attention_backward,
    attention_decode,
    rope,
    rope_backward,
    dropout,
    lm_loss,
    lm_loss_forward_backward,
    squared_error,
    squared_error_forward_backward,
    pick,
    pick_backward,
    loss_sum,
    cap_logits,
    add,
    fill,
    global_norm,
    share_norm,
    rms,
    rms_of_ranks,
    adamw,
    adamw_bf16,
    adamw_int8,
    sgd,
    lion,
    schedule_free_count,
    schedule_free,
    schedule_free_average,
    adafactor,
    ema,
    muon_momentum,
    muon,
)
OPS = {op.name: op for op in _ALL}
