"""The MAGI-1 transformer for training: batched, differentiable, float32, and over the official tensor names.

`magi/transformer/model.py` runs a window chunk by chunk and takes the K/V of clean chunks from a cache. Here all chunks of a
window, the clean ones too, are one sequence under a block mask. On the same weights the velocities are the same
(tests/tools/test_forward.py), so that what is trained is what runs.

Shapes: B samples, n chunks of a window, M = B * n chunks, W latent frames and S tokens of a chunk, L text tokens,
D hidden size, H query heads, G K/V groups, d head size, a rotary angles.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from magi.config import ModelConfig
from magi.sampling.captions import NULL_TOKENS
from magi.transformer.layers import timestep_frequencies
from magi.transformer.rope import rope_angles, rotate

_TIME_FREQUENCIES = 256
_INTERLEAVE = 8  # the projection takes self and cross attention interleaved in this many feature blocks


class OnePNorm(nn.LayerNorm):
    """A layer norm that a checkpoint holds as weight - 1, or as it is where the config says so."""

    def __init__(self, size: int, config: ModelConfig, scale: float = 1.0) -> None:
        super().__init__(size, config.layernorm_epsilon)
        self._added = float(config.apply_layernorm_1p)
        nn.init.constant_(self.weight, scale - self._added)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes the last axis: (..., size) -> (..., size)."""
        return F.layer_norm(x, self.normalized_shape, self.weight + self._added, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Self attention over the chunks that each chunk sees, and cross attention to its caption."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, head, kv = config.hidden_size, config.kv_channels, config.num_query_groups * config.kv_channels
        self.head = head
        self.linear_qkv = nn.ModuleDict(
            {
                "layer_norm": nn.LayerNorm(size, config.layernorm_epsilon),
                "q": nn.Linear(size, size, bias=False),
                "qx": nn.Linear(size, size, bias=False),
                "k": nn.Linear(size, kv, bias=False),
                "v": nn.Linear(size, kv, bias=False),
            }
        )
        self.linear_kv_xattn = nn.Linear(size, 2 * kv, bias=False)
        self.linear_proj = nn.Linear(2 * size, size, bias=False)
        self.q_layernorm = OnePNorm(head, config)
        self.k_layernorm = OnePNorm(head, config)
        self.q_layernorm_xattn = OnePNorm(head, config)
        self.k_layernorm_xattn = OnePNorm(head, config)

    def forward(
        self,
        x: torch.Tensor,
        chunks: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        text: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Computes what attention adds to the hidden states, before gate and norm.

        Args:
            x: (M, S, D).
            chunks: n, chunks of a window.
            angles: cosine and sine, (M * S, a) each.
            mask: which tokens each token sees, (B, 1, n * S, n * S) bool; None: all.
            text: projected captions, (M, L, D).
            text_mask: which text tokens are no padding, (M, 1, 1, L) bool.

        Returns:
            (M, S, D).
        """
        project = self.linear_qkv
        normed = project["layer_norm"](x)
        q = self._rotated(self.q_layernorm(self._heads(project["q"](normed))), angles, chunks)  # (B, H, n * S, d)
        k = self._rotated(self.k_layernorm(self._heads(project["k"](normed))), angles, chunks)  # (B, G, n * S, d)
        v = rearrange(project["v"](normed), "(b n) s (g d) -> b g (n s) d", n=chunks, d=self.head)  # (B, G, n * S, d)
        self_attn = rearrange(_attend(q, k, v, mask), "b h (n s) d -> (b n) s (h d)", n=chunks)  # (M, S, D)

        cross_q = self.q_layernorm_xattn(self._heads(project["qx"](normed))).transpose(1, 2)  # (M, H, S, d)
        cross_k, cross_v = rearrange(
            self.linear_kv_xattn(text), "m l (g two d) -> two m g l d", two=2, d=self.head
        )  # (M, G, L, d) each
        cross_attn = _attend(cross_q, self.k_layernorm_xattn(cross_k), cross_v, text_mask)  # (M, H, S, d)
        cross_attn = rearrange(cross_attn, "m h s d -> m s (h d)")  # (M, S, D)

        both = torch.stack([self_attn, cross_attn])
        return self.linear_proj(rearrange(both, "two m s (b f) -> m s (b two f)", b=_INTERLEAVE))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head))  # (M, S, heads, d)

    def _rotated(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], chunks: int) -> torch.Tensor:
        """Rotates the heads by their positions: (M, S, heads, d) -> (B, heads, n * S, d)."""
        rotated = rotate(x.flatten(0, 1), *angles).view_as(x)
        return rearrange(rotated, "(b n) s h d -> b h (n s) d", n=chunks)


class Mlp(nn.Module):
    """The MLP with its norm: GELU or SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.gated_linear_unit
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.linear_fc1 = nn.Linear(config.hidden_size, config.fc1_size, bias=False)
        self.linear_fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes what the MLP adds to the hidden states, before gate and norm: (M, S, D) -> (M, S, D)."""
        hidden = self.linear_fc1(self.layer_norm(x))
        if not self.gated:
            return self.linear_fc2(F.gelu(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * value)


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # All layers together add about as much to the hidden states as the patch embedding put there.
        scale = 1 / math.sqrt(2 * config.num_layers)
        self.ada_modulate_layer = nn.ModuleDict(
            {"proj": nn.Sequential(nn.Linear(config.cond_size, 2 * config.hidden_size))}
        )
        self.self_attention = SelfAttention(config)
        self.self_attn_post_norm = OnePNorm(config.hidden_size, config, scale)
        self.mlp = Mlp(config)
        self.mlp_post_norm = OnePNorm(config.hidden_size, config, scale)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        chunks: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        text: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Runs the layer: (M, S, D) -> (M, S, D). `condition` is (M, 1, cond); the rest as for `SelfAttention`."""
        attn_gate, mlp_gate = self.ada_modulate_layer["proj"](F.silu(condition)).tanh().chunk(2, dim=-1)  # (M, 1, D)
        attention = self.self_attention(x, chunks, angles, mask, text, text_mask)
        x = x + self.self_attn_post_norm(attention * attn_gate)
        return x + self.mlp_post_norm(self.mlp(x) * mlp_gate)


class TrainingTransformer(nn.Module):
    """A MAGI-1 transformer whose `state_dict` has the names and shapes of an official checkpoint, all float32."""

    def __init__(self, config: ModelConfig) -> None:
        """Builds a model with fresh weights from torch's global generator; its first velocities are zero.

        Args:
            config: the transformer's shape; models that take latents twice (24B) are not supported.
        """
        super().__init__()
        if config.half_channel_vae:
            raise ValueError("Training of models with half_channel_vae is not supported.")
        self.config = config
        size, cond, patch = config.hidden_size, config.cond_size, config.patch_size
        text = config.caption_channels
        self.x_embedder = nn.Conv3d(config.in_channels, size, (1, patch, patch), bias=False)
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(_TIME_FREQUENCIES, cond), nn.SiLU(), nn.Linear(cond, cond))}
        )
        self.y_embedder = nn.ModuleDict(
            {
                "y_proj_xattn": nn.Sequential(nn.Linear(text, size), nn.SiLU()),
                "y_proj_adaln": nn.Sequential(nn.Linear(text, cond)),
            }
        )
        self.y_embedder.null_caption_embedding = nn.Parameter(torch.randn(config.caption_max_length, text))
        self.rope = nn.Module()
        self.rope.bands = nn.Parameter(initial_bands(config.kv_channels // 8))
        self.videodit_blocks = nn.ModuleDict(
            {
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "final_layernorm": OnePNorm(size, config),
            }
        )
        self.final_linear = nn.ModuleDict({"linear": nn.Linear(size, patch**2 * config.out_channels, bias=False)})
        self.register_buffer("frequencies", timestep_frequencies(_TIME_FREQUENCIES // 2), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draws the matrices so that they keep a unit variance, opens the gates, and silences the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Block):
                # A norm follows the gates: at zero its gradient would explode.
                gates = module.ada_modulate_layer["proj"][0]
                nn.init.ones_(gates.bias)
                nn.init.normal_(gates.weight, std=0.1 * gates.in_features**-0.5)
        nn.init.zeros_(self.final_linear["linear"].weight)

    def forward(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        captions: torch.Tensor,
        lengths: torch.Tensor,
        conditional: torch.Tensor,
        positions: torch.Tensor,
        sees: torch.Tensor,
        step_sizes: torch.Tensor | None = None,
        tap: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes the velocities of all chunks of a batch of windows.

        Args:
            latents: (B, n, 16, W, h, w) float32.
            times: 0 (noise) .. 1 (clean), (B, n) float32.
            captions: (B, n, L, caption_channels), padded with anything.
            lengths: tokens of each caption, (B, n); 0 takes the learned null caption, as the sampler does.
            conditional: which of the two learned condition vectors a chunk gets, (B, n) bool.
            positions: index of each chunk in its video, (B, n).
            sees: whether chunk i sees the K/V of chunk j, (B, n, n) bool. Every chunk sees at least itself.
            step_sizes: second time signal of distilled models, (B, n) float32.
            tap: a layer after which the hidden states, (M, S, D), are returned, too.

        Returns:
            (B, n, 16, W, h, w) float32; with `tap`, a pair of these and the hidden states.
        """
        c, (chunks, _, frames, height, width) = self.config, latents.shape[1:]
        rows, columns = height // c.patch_size, width // c.patch_size
        patches = rearrange(
            latents * c.x_rescale_factor,
            "b n c t (h p) (w q) -> (b n) (t h w) (c p q)",
            p=c.patch_size,
            q=c.patch_size,
        )  # (M, S, channels * patch)
        x = F.linear(patches, self.x_embedder.weight.flatten(1))  # (M, S, D)
        condition = self._condition(times, conditional, step_sizes).flatten(0, 1)[:, None]  # (M, 1, cond)
        angles = self._angles(positions, frames, rows, columns).flatten(0, 2)  # (M * S, a)
        angles = angles.cos(), angles.sin()
        text, text_mask = self._text(captions, lengths)
        mask = None if chunks == 1 else _per_token(sees, x.shape[1])[:, None]  # (B, 1, n * S, n * S)
        hidden = x
        for layer, block in enumerate(self.videodit_blocks["layers"]):
            x = block(x, condition, chunks, angles, mask, text, text_mask)
            hidden = x if layer == tap else hidden
        out = self.final_linear["linear"](self.videodit_blocks["final_layernorm"](x))  # (M, S, patch * channels)
        out = rearrange(
            out,
            "(b n) (t h w) (p q c) -> b n c t (h p) (w q)",
            n=chunks,
            h=rows,
            w=columns,
            p=c.patch_size,
            q=c.patch_size,
        )
        velocity = out / c.x_rescale_factor
        return velocity if tap is None else (velocity, hidden)

    def _condition(
        self, times: torch.Tensor, conditional: torch.Tensor, step_sizes: torch.Tensor | None
    ) -> torch.Tensor:
        """Embeds times, step sizes and the kind of pass: (B, n, cond)."""
        condition = self._time(times)
        if step_sizes is not None:
            condition = condition + self._time(step_sizes)
        kinds = self.y_embedder["y_proj_adaln"](self.y_embedder.null_caption_embedding[-2:])  # (2, cond)
        return condition + torch.where(conditional[..., None], kinds[0], kinds[1])

    def _time(self, t: torch.Tensor) -> torch.Tensor:
        # As `timestep_embedding`, order of the products included.
        args = t[..., None].float() * self.frequencies * 1000  # (B, n, frequencies)
        return self.t_embedder["mlp"](torch.cat([args.cos(), args.sin()], dim=-1))

    def _angles(self, positions: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        """Computes the rotary angles of all tokens: (B, n, S, a)."""
        bands = self.rope.bands
        space = rope_angles(bands, 0, frames, rows, columns)[:, len(bands) :]  # (S, those of h and w)
        t = positions[..., None] * frames + torch.arange(frames, device=positions.device)  # (B, n, W)
        time = t.repeat_interleave(rows * columns, dim=-1)[..., None] * bands  # (B, n, S, those of t)
        return torch.cat([time, space.expand(*positions.shape, -1, -1)], dim=-1)

    def _text(self, captions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the null caption in place of empty ones and projects all: (M, L, D), and their mask (M, 1, 1, L)."""
        null = self.y_embedder.null_caption_embedding[:NULL_TOKENS]
        tokens = max(captions.shape[2], len(null))
        captions = F.pad(captions, (0, 0, 0, tokens - captions.shape[2]))
        null = F.pad(null, (0, 0, 0, tokens - len(null)))
        empty = lengths == 0
        captions = torch.where(empty[..., None, None], null, captions)
        lengths = lengths.masked_fill(empty, min(NULL_TOKENS, self.config.caption_max_length))
        held = torch.arange(tokens, device=lengths.device) < lengths[..., None]  # (B, n, L)
        return self.y_embedder["y_proj_xattn"](captions.flatten(0, 1)), held.flatten(0, 1)[:, None, None]


def initial_bands(count: int) -> torch.Tensor:
    """Returns rotary frequencies to start from, (count,): 1.5 radians per frame, and each less than half of the one before.

    Those of the released models fall to 1e-4: pictures of a few tokens would look the same to most of them.
    """
    return 1.5 * 0.45 ** torch.arange(count)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Computes attention; consecutive query heads share a K/V head: (B, H, N, d) and (B, G, N', d) -> (B, H, N, d)."""
    if shared := q.shape[1] // k.shape[1] - 1:
        k, v = (x.repeat_interleave(shared + 1, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


def _per_token(sees: torch.Tensor, tokens: int) -> torch.Tensor:
    """Spreads a mask over chunks to their tokens: (B, n, n) -> (B, n * S, n * S)."""
    return sees.repeat_interleave(tokens, dim=1).repeat_interleave(tokens, dim=2)
