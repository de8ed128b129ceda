"""The layer in plain torch. T tokens, K slots a token, H hidden, I intermediate, E experts."""

import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def quantise(values, scale_byte):
    """(R, N) float32 to E4M3 codes (R, N) uint8 and UE8M0 bytes (R, N/32) uint8."""
    groups = values.double().unflatten(1, (-1, 32))
    byte = scale_byte(groups.abs().nan_to_num(0, torch.inf).amax(2).float())
    scaled = (groups * (127.0 - byte.double()).exp2().unsqueeze(2)).clamp(-448, 448).float()
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill(scaled.isnan(), 0x7F)
    return codes.flatten(1), byte.to(torch.uint8)


def staging_byte(amax):
    """(R, G) float32 to integers: the power of two at or above amax / 448, plus 127."""
    return (((amax.clamp_min(1e-4) / 448).view(torch.int32) + 0x7FFFFF) >> 23).clamp(1, 254)


def requant_byte(amax):
    """The same for activations, in the form of the fused kernel."""
    return ((amax.view(torch.int32).long() + 0x1FFFFF >> 23) - 8).clamp_min(105)


def decode(values, byte):
    """(R, N) float64 times the scale factors 2^(byte - 127), (R, N/32) uint8; exact."""
    scale = (byte.double() - 127).exp2().masked_fill(byte == 255, torch.nan)
    return (values.unflatten(1, (-1, 32)) * scale.unsqueeze(2)).flatten(1)


def fp8(codes, byte):
    """E4M3 codes (R, N) uint8 and their scale bytes to (R, N) float64."""
    return decode(codes.view(torch.float8_e4m3fn).double(), byte)


def fp4(packed, byte):
    """E2M1 weights (R, N/2) uint8, the low nibble first, and scale bytes to (R, N) float64."""
    return decode(E2M1[torch.stack([packed & 15, packed >> 4], 2).flatten(1).int()], byte)


class Mine:
    """Every sum is a float64 sum, rounded once to float32."""

    name = "mine"
    accumulator = "fp32"  # the class of sums: fp32 or wider, in any order
    contracts = ("2026-11",)  # the revision of the numerics

    def forward(self, p):
        """p.hidden_states (T, H) bfloat16; p.topk_ids (T, K), -1: empty; p.topk_weights (T, K)."""
        tokens, top_k = p.topk_ids.shape
        x = fp8(*quantise(p.hidden_states.float(), staging_byte))  # (T, H) float64
        codes = p.topk_ids.new_zeros(tokens, top_k, p.intermediate_size, dtype=torch.uint8)
        scales = codes.new_zeros(tokens, top_k, p.intermediate_size // 32)
        y = codes.new_zeros(tokens, p.hidden_size, dtype=torch.float32)
        for k in range(top_k):  # the combine adds the slots in ascending order
            for e in range(p.num_experts):
                t = (p.topk_ids[:, k] == e).nonzero()[:, 0]  # the R tokens with expert e in slot k
                if len(t) == 0:
                    continue
                w13 = fp4(p.w13_weight[e], p.w13_weight_scale[e])  # (2I, H): gate rows, up rows
                w2 = fp4(p.w2_weight[e], p.w2_weight_scale[e])  # (H, I)
                gate, up = (x[t] @ w13.T).float().bfloat16().float().chunk(2, 1)  # (R, I) each
                if p.activation_clamp is not None:
                    bound = gate.new_tensor(p.activation_clamp).bfloat16().float()
                    gate, up = gate.fmin(bound), up.fmax(-bound).fmin(bound)
                silu = gate / (1 + (-gate).double().exp().float())
                act = silu * up * p.topk_weights[t, k, None]  # (R, I) float32
                codes[t, k], scales[t, k] = quantise(act, requant_byte)
                y[t] += (fp8(codes[t, k], scales[t, k]) @ w2.T).float().bfloat16().float()
        return {"y": y.bfloat16(), "l2_acts": codes, "l2_acts_sf": scales}
