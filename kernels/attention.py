"""The weights of an attention, applied to other values than its own, without an L x S matrix.

    A^h = softmax(q^h k^hT * scale + mask)      apply(values)^h = A^h values       o^h = A^h v^h W_O^h

``apply`` is a second fused attention call with the given columns as values. What would make such a call fall back to
the path that writes A out is kept from it:

* another width of the values: q, k and values are padded with zeros to one width, wide values split;
* a mask of L x S: padding and documents become columns of q and k whose product is 0 where a query may look and -1e30
  where not, exactly. One column says that a key is padded. Documents are numbered 0, 1, ... in their row, and each bit
  of the number takes two columns, of which a query reads the one that is 1 for keys whose bit differs;
* the last L of S keys' queries (incremental decoding): a causal mask of L x S is made for a few queries at a time.

``apply_reference``, the definition, writes A out. So does torch in float64 on CUDA, for which it has no fused kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e30  # far below any logit, far above the lowest float32 even when every bit differs
_WIDEST = 256  # of one call: what fused kernels take on any device
_ALIGNMENT = 8  # of the width
_BLOCK = 64  # queries a mask is made for at a time


class AttentionWeights:
    """The attention before a layer, as its routers may use it: ``TokenContext.attention``.

        attention = AttentionWeights(q, k, causal=True, padding_mask=mask, v=v, w_out=self.out.weight)
        layer(x, TokenContext.for_tokens(x, causal=True, padding_mask=mask, attention=attention))

    The queries are the last L of the S tokens that the keys belong to: self-attention, with L = S unless earlier keys
    come from a cache. It computes in at least float32 and keeps the graph of q, k, v and w_out.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool,
        padding_mask: Tensor | None = None,
        document: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        v: Tensor | None = None,
        w_out: Tensor | None = None,
    ) -> None:
        """
        Args:
            q: [B, H, L, d] queries, positions (rotary) already in them.
            k: [B, Hkv, S, d] keys; Hkv divides H, query head h reads key head h * Hkv // H.
            causal: token i sees tokens 0..i only.
            padding_mask: [B, S] bool, True = a real token. A padded token is not seen, and its own row is 0.
            document: [B, S] integers: a token sees its own document only.
            mask: for what the others cannot say (windows, relative biases): bool, True = seen, or added to the
                logits; it broadcasts to [B, H, L, S], and every token must see itself.
            scale: of q k^T; by default d ** -0.5.
            v: [B, Hkv, S, dv], and
            w_out: [D, H * dv], the weight of the output's linear layer: what ``head_contributions`` needs.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            given = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
            raise ValueError(f"{given}: expected [B, H, L, d] and [B, Hkv, S, d]")
        (batch_size, heads, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
        if not key_heads or heads % key_heads:
            raise ValueError(f"{heads} heads of queries and {key_heads} of keys: the second must divide the first")
        if queries > keys:
            raise ValueError(f"{queries} queries and {keys} keys: the queries are those of the last tokens, give all k")
        for name, tensor in (("padding_mask", padding_mask), ("document", document)):
            if tensor is not None and tensor.shape != (batch_size, keys):
                given = f"{name} has shape {tuple(tensor.shape)}"
                raise ValueError(f"{given}: expected ({batch_size}, {keys}), one entry a key")
        if padding_mask is not None and padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask is {padding_mask.dtype}: expected torch.bool, give padding_mask.bool()")
        if mask is not None and (mask.dim() < 2 or not _broadcasts(mask.shape, (batch_size, heads, queries, keys))):
            given = f"mask has shape {tuple(mask.shape)}"
            raise ValueError(f"{given}: expected [L, S] or what broadcasts to {(batch_size, heads, queries, keys)}")
        if v is not None and (v.dim() != 4 or v.shape[:3] != k.shape[:3]):
            raise ValueError(f"v has shape {tuple(v.shape)}: expected {(*k.shape[:3], 'dv')}, like k {tuple(k.shape)}")
        if w_out is not None and v is not None and w_out.shape[1:] != (heads * v.shape[3],):
            raise ValueError(
                f"w_out has shape {tuple(w_out.shape)}: expected [D, {heads * v.shape[3]}], {heads} heads of v's width"
            )
        self.q, self.k, self.v, self.w_out = q, k, v, w_out
        self.causal, self.padding_mask, self.document, self.mask = causal, padding_mask, document, mask
        self.scale = width**-0.5 if scale is None else scale

    def apply(self, values: Tensor) -> Tensor:
        """The weights of every head times values [B, S, C] -> [B, H, L, C], float32 (float64 where values or q are)."""
        return self._attend(self._of_every_head(values))

    def apply_reference(self, values: Tensor) -> Tensor:
        """As ``apply``."""
        values = self._of_every_head(values)
        q, k, values = self._operands(values)
        logits = q @ k.transpose(2, 3) * self.scale
        queries, keys = logits.shape[2:]
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
        if self.causal:
            seen = seen.tril(keys - queries)
        if self.padding_mask is not None:
            seen = seen & self.padding_mask[:, None, None, :]
        if self.document is not None:
            seen = seen & (self.document[:, None, keys - queries :, None] == self.document[:, None, None, :])
        if self.mask is not None and self.mask.dtype == torch.bool:
            seen = seen & self.mask
        elif self.mask is not None:
            logits = logits + self.mask
        # a row that sees nothing is 0: the lowest number instead of -inf keeps NaN out of its gradient
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(~seen, 0)
        return self._without_padded_rows(weights @ values)

    def head_contributions(self) -> Tensor:
        """What each head adds to each token: A^h v^h W_O^h, [B, H, L, D]. Their sum is the attention's output, without
        the bias of its output layer.

        Raises:
            ValueError: it was made without v or w_out.
        """
        if self.v is None or self.w_out is None:
            missing = " and ".join(name for name, given in (("v", self.v), ("w_out", self.w_out)) if given is None)
            raise ValueError(
                f"this attention was made without {missing}, which the heads' contributions need: whoever builds it "
                "gives AttentionWeights(q, k, v=..., w_out=...)"
            )
        heads_BHLC = self._attend(_repeat_heads(self.v, self.q.shape[1]))
        w_HCD = self.w_out.to(heads_BHLC.dtype).unflatten(1, (self.q.shape[1], -1)).permute(1, 2, 0)
        return heads_BHLC @ w_HCD

    def _of_every_head(self, values: Tensor) -> Tensor:
        """[B, S, C] -> [B, H, S, C], the same for every head."""
        batch_size, keys = self.k.shape[0], self.k.shape[2]
        if values.dim() != 3 or values.shape[:2] != (batch_size, keys):
            hint = "" if keys == self.q.shape[2] else "; values of earlier tokens come from a cache"
            raise ValueError(
                f"values have shape {tuple(values.shape)}: expected [{batch_size}, {keys}, C], one row a key{hint}"
            )
        return values[:, None].expand(-1, self.q.shape[1], -1, -1)

    def _operands(self, values_BHSC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and values in one dtype, a k for every head, 0 at padded tokens, which may hold anything."""
        dtype = torch.promote_types(torch.promote_types(self.q.dtype, values_BHSC.dtype), torch.float32)
        q, k, values = self.q.to(dtype), _repeat_heads(self.k.to(dtype), self.q.shape[1]), values_BHSC.to(dtype)
        if self.padding_mask is not None:
            padded = ~self.padding_mask[:, None, :, None]
            q = q.masked_fill(padded[:, :, k.shape[2] - q.shape[2] :], 0)
            k, values = k.masked_fill(padded, 0), values.masked_fill(padded, 0)
        return q, k, values

    def _without_padded_rows(self, rows_BHLC: Tensor) -> Tensor:
        if self.padding_mask is None:
            return rows_BHLC
        last = self.k.shape[2] - self.q.shape[2]
        return rows_BHLC.masked_fill(~self.padding_mask[:, None, last:, None], 0)

    def _attend(self, values_BHSC: Tensor) -> Tensor:
        """The weights of each head times its own values. [B, H, S, C] -> [B, H, L, C]"""
        q, k, values = self._operands(values_BHSC)
        columns = values.shape[3]
        if not columns:
            return values[:, :, : q.shape[2]]
        q, k = self._with_mask_columns(q * self.scale, k)
        width = max(q.shape[3], min(columns, _WIDEST))
        width += -width % _ALIGNMENT
        q, k = F.pad(q, (0, width - q.shape[3])), F.pad(k, (0, width - k.shape[3]))
        results = []
        for piece in values.split(width, dim=3):
            rows = self._call(q, k, F.pad(piece, (0, width - piece.shape[3])))
            results.append(rows[..., : piece.shape[3]])
        return self._without_padded_rows(torch.cat(results, dim=3))

    def _with_mask_columns(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Columns whose product is 0 where a query may look and ``_NEVER`` or less where not."""
        past = k.shape[2] - q.shape[2]
        more_q, more_k = [], []
        if self.padding_mask is not None:
            padded_BS1 = ~self.padding_mask[:, :, None]
            more_q.append(torch.ones_like(padded_BS1[:, past:]))
            more_k.append(padded_BS1)
        if self.document is not None:
            bits_BSM = _bits(self.document)
            more_q += [bits_BSM[:, past:], ~bits_BSM[:, past:]]
            more_k += [~bits_BSM, bits_BSM]
        if not more_q:
            return q, k
        more_q = torch.cat(more_q, dim=2)[:, None].expand(-1, q.shape[1], -1, -1).to(q.dtype) * _NEVER
        more_k = torch.cat(more_k, dim=2)[:, None].expand(-1, k.shape[1], -1, -1).to(k.dtype)
        return torch.cat([q, more_q], dim=3), torch.cat([k, more_k], dim=3)

    def _call(self, q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        """Fused attention under ``causal`` and ``mask``. All of one width."""
        queries, keys = q.shape[2], k.shape[2]
        if self.mask is None and (not self.causal or queries in (1, keys)):
            causal = self.causal and queries > 1
            return F.scaled_dot_product_attention(q, k, values, is_causal=causal, scale=1.0)
        if not queries:
            return values[:, :, :0]
        results = []
        for start in range(0, queries, _BLOCK):
            end = min(start + _BLOCK, queries)
            seen = keys - queries + end if self.causal else keys
            mask = self._mask_of(start, end, seen, q)
            results.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:end], k[:, :, :seen], values[:, :, :seen], attn_mask=mask, scale=1.0
                )
            )
        return torch.cat(results, dim=2)

    def _mask_of(self, start: int, end: int, seen: int, q: Tensor) -> Tensor:
        """The mask of queries start..end and keys 0..seen, [1 or B, 1 or H, end - start, seen]."""
        mask = None
        if self.causal:
            mask = torch.ones(1, 1, end - start, seen, dtype=torch.bool, device=q.device).tril(seen - (end - start))
        if self.mask is None:
            return mask
        queries, keys = q.shape[2], self.k.shape[2]
        own = self.mask.expand(*self.mask.shape[:-2], queries, keys)[..., start:end, :seen]
        own = own.reshape(*[1] * (4 - own.dim()), *own.shape)
        if own.dtype != torch.bool:
            own = own.to(q.dtype)
            return own if mask is None else own.masked_fill(~mask, -torch.inf)
        return own if mask is None else own & mask


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, Hkv, S, d] -> [B, H, S, d]; query head h reads head h * Hkv // H."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _bits(document_BS: Tensor) -> Tensor:
    """Numbers the documents of each row 0, 1, ... and writes the number in bits: [B, S, M] bool, M for S documents."""
    ordered, order = document_BS.sort(dim=1)
    rank = (ordered.diff(dim=1, prepend=ordered[:, :1]) != 0).cumsum(1)
    rank_BS = torch.empty_like(rank).scatter(1, order, rank)
    place_M = torch.arange(max(document_BS.shape[1] - 1, 1).bit_length(), device=document_BS.device)
    return (rank_BS[:, :, None] >> place_M) & 1 == 1
