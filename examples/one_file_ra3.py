"""RA3 in one file, on a toy, in plain torch: `python examples/one_file_ra3.py` (ten seconds, on one core).
Paper: Learning to Reason as Action Abstractions with Scalable Mid-Training RL, https://huggingface.co/papers/2509.25810

The expert writes blocks of two lines, given a state (kind, u, v). An easy block copies u. A hard one depends on u + v
mod K, which the policy can't compute while it writes a line (additive in u and v), but can if it thinks first: it may
begin a block with "#" and a latent z, which the lines see. That is rigged on purpose: it is the situation that RA3 is
for, and says nothing about how common it is in real code. The base has read comments, and that lines obey them, but
its own are random. Defaults are those of `RA3Config` but for rates and sizes; docs/design.md has the reasons.
"""

import math
from copy import deepcopy
from statistics import fmean, stdev

import torch
from torch import nn


K, LINES, G = 8, 2, 8  # symbols of a line; lines that a latent serves (the horizon); latents tried at each boundary
PENALTY, DISCOUNT, KL, EXPLORE = 0.2, 0.9, 0.05, 0.05  # EXPLORE: share of thinking beside the gate's
E_STEPS, M_STEPS = 400, 200
EASY, HARD, THINK, NO_LATENT = 0, 1, K, K  # THINK is the symbol "#"


class Policy(nn.Module):
    """Writes blocks, `[# z] line line`. Shapes: B blocks, G latents, H lines, K latents or symbols, V = K and "#"."""

    def __init__(self):
        super().__init__()
        self.state = nn.Embedding(2 * K * K, 16)  # by kind, u and v: what to think, and whether
        self.latent, self.think = nn.Linear(16, K, bias=False), nn.Linear(16, 1)
        self.of_u, self.of_v, self.of_z = (nn.Embedding(n, LINES * (K + 1)) for n in (2 * K, 2 * K, K + 1))
        for layer in (self.latent, self.of_u, self.of_v, self.of_z):
            nn.init.zeros_(layer.weight)

    def forward(self, s, z, lines_BH):
        """log pi(line | s, z) of the lines `[B, H]`, of "#" in the place of each `[B, H]`, log pi(z | s) `[B, K]`."""
        kind, u, v = s
        state = self.state((kind * K + u) * K + v)
        logits_BHV = (self.of_u(kind * K + u) + self.of_v(kind * K + v) + self.of_z(z)).view(-1, LINES, K + 1)
        logps_BHV = (logits_BHV + nn.functional.pad(self.think(state), (K, 0))[:, None]).log_softmax(-1)
        of_lines_BH = logps_BHV.gather(-1, lines_BH[..., None])[..., 0]
        return of_lines_BH, logps_BHV[..., THINK], self.latent(state).log_softmax(-1)


def expert(noise, count=256, comments=(0.0, 0.0)):
    """Blocks of text: states, lines `[B, H]`, comments at a rate for each kind (with which a block is hard)."""
    kind, u, v = (torch.randint(n, (count,), generator=noise) for n in (2, K, K))
    commented, topic = torch.rand(count, generator=noise) < torch.tensor(comments)[kind], (u + v) % K
    hard = torch.stack([(3 * topic + 1) % K, (5 * topic + 2) % K], 1)
    lines = torch.where((commented | (kind == HARD))[:, None], hard, u[:, None])
    return (kind, u, v), lines, torch.where(commented, topic, NO_LATENT)


@torch.no_grad()
def roll_out(policy, s, lines, none, noise):
    """Latents `[B, G]`; returns of the lines under each `[B, G]`, and without a latent `[B]`."""
    z_BG = torch.multinomial(policy(s, none, lines)[2].exp(), G, replacement=True, generator=noise)
    outputs = [policy(s, z, lines) for z in (*z_BG.T, none)]
    # R = l - log(1 - p): a line's probability holds that of not thinking (again) before it. Left in, it would make any
    # comment look like a gain, since one hardly thinks twice.
    rewards = [line_BH - torch.log1p(-gate_BH.exp().clamp(max=1 - 1e-6)) for line_BH, gate_BH, _ in outputs]
    *latent, act_B = (reward_BH @ DISCOUNT ** torch.arange(LINES) for reward_BH in rewards)
    return z_BG, torch.stack(latent, 1), act_B


def e_phase(policy, noise):
    """Self-supervised RL: latents that make the expert's next lines likelier than they cost."""
    start, pays, held = deepcopy(policy).requires_grad_(False), [], True
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
    for step in range(E_STEPS):
        s, lines, none = expert(noise)
        z_BG, returns_BG, act_B = roll_out(policy, s, lines, none, noise)
        outputs = (model(s, none, lines) for model in (policy, start))
        (gate_B, logps_BG), (start_gate_B, start_logps_BG) = ((g[:, 0], z.gather(1, z_BG)) for _, g, z in outputs)
        # What is raised is the multi-sample bound, log[(1 - p) exp G_act + p mean_g exp(G_g - c)]: of several latents
        # the best count. The mean of gains would close the gate where wrong latents cost what right ones bring.
        p_B, worth_BG = gate_B.exp(), returns_BG - act_B[:, None] - PENALTY
        bound_B = torch.log(1 - p_B + p_B * worth_BG.exp().mean(1))
        # The held gate: comments mostly harm at first, and the gate would close before they can improve. Until they
        # are known to pay where the policy thinks (mean less two standard errors over ten updates), it has no slope of
        # its own, and a KL to the start anchors it: it shares weights with the latents, with which it could drift.
        # (Also left out: it is held again where it was lost.)
        joint_B = worth_BG.logsumexp(1) - math.log(G)
        pays = [*pays, float((p_B * joint_B).sum().detach() / p_B.sum().detach())][-10:]
        held = held and (len(pays) < 5 or fmean(pays) < 2 * stdev(pays) / len(pays) ** 0.5)
        anchor = nn.functional.binary_cross_entropy(p_B, start_gate_B.exp())  # the KL and a constant
        gate_loss = anchor if held else -bound_B.mean()
        # A latent counts for its posterior probability, by which annotation draws it too, less what the others alone
        # would give: nothing is won where all of them harm, not even by the least harmful. `think_B` is how often one
        # thinks here: of many boundaries in a text the trainer tries some, in proportion to it.
        with torch.no_grad():
            think_B = ((1 - EXPLORE) * p_B + EXPLORE)[:, None]
            weight_BG = think_B * worth_BG.exp()
            others_BG = (weight_BG.sum(1, keepdim=True) - weight_BG) / (G - 1)
            posterior_BG = weight_BG / (1 - think_B + weight_BG.mean(1, keepdim=True))
            advantage_BG = posterior_BG - others_BG / (1 - think_B + others_BG)
        log_ratio_BG = start_logps_BG - logps_BG
        latent_loss_BG = -advantage_BG * logps_BG + KL * think_B * (log_ratio_BG.exp() - 1 - log_ratio_BG)
        optimizer.zero_grad()
        (gate_loss + latent_loss_BG.mean()).backward()
        optimizer.step()
        if step % 50 == 0:
            think = f"P(think) hard {p_B[s[0] == HARD].mean():.2f}, {'held' if held else 'free'}"
            print(f"  E-update {step:3}: latents bring {pays[-1]:+.2f} nats where it thinks, {think}")


def annotate(policy, noise):
    """Expert text with latents, resampled: one or none, in proportion to prior times likelihood of the lines. The
    prior is how often the E-step thinks; a latent that is drawn and does not pay its cost is not placed."""
    s, lines, none = expert(noise)
    z_BG, returns_BG, act_B = roll_out(policy, s, lines, none, noise)
    with torch.no_grad():
        prior_B = (1 - EXPLORE) * policy(s, none, lines)[1][:, :1].exp() + EXPLORE
    logits = torch.cat([torch.log(1 - prior_B) + act_B[:, None], torch.log(prior_B / G) + returns_BG], 1)
    chosen = torch.multinomial(logits.softmax(-1), 1, generator=noise)
    gain = torch.cat([act_B[:, None], returns_BG], 1).gather(1, chosen)[:, 0] - act_B
    z = torch.cat([none[:, None], z_BG], 1).gather(1, chosen)[:, 0]
    return s, lines, torch.where(gain > PENALTY, z, none)


def next_token_phase(policy, parameters, steps, text):
    """The M-step: next-token prediction on what `text()` gives, `#` and latent where there is one, then the lines."""
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        s, lines, z = text()
        _, gate_BH, logps_BK = policy(s, torch.full_like(z, NO_LATENT), lines)
        latent_B = gate_BH[:, 0] + logps_BK.gather(1, z.clamp(max=K - 1)[:, None])[:, 0]
        loss = -(policy(s, z, lines)[0].sum() + latent_B[z != NO_LATENT].sum()) / lines.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def report(name, policy):
    """P(think), and the exact held-out log-likelihood of a line: latents are few enough to be summed over."""
    s, lines, none = expert(torch.Generator().manual_seed(1), 4096)
    plain_BH, gate_BH, logps_BK = policy(s, none, lines)
    under_BK = torch.stack([policy(s, torch.full_like(none, z), lines)[0].sum(1) for z in range(K)], 1)
    thought_B = (gate_BH[:, :1] + logps_BK + under_BK).logsumexp(1)
    likelihood = float(torch.logaddexp(plain_BH.sum(1), thought_B).mean()) / LINES
    easy, hard = (float(gate_BH[s[0] == kind, 0].exp().mean()) for kind in (EASY, HARD))
    print(f"{name:24} P(think) easy {easy:.3f}  hard {hard:.3f}   nats per expert line {likelihood:+.3f}")
    return likelihood


def main():
    torch.manual_seed(0)
    noise, policy = torch.Generator().manual_seed(0), Policy()
    all_but_latents = [p for name, p in policy.named_parameters() if name != "latent.weight"]
    next_token_phase(policy, all_but_latents, 600, lambda: expert(noise, comments=(0.1, 0.4)))
    report("base", policy)
    plain = deepcopy(policy)
    next_token_phase(plain, plain.parameters(), E_STEPS + M_STEPS, lambda: expert(noise))
    ntp = report("next-token prediction", plain)
    e_phase(policy, noise)
    report("RA3, after the E-phase", policy)
    frozen = deepcopy(policy)
    next_token_phase(policy, policy.parameters(), M_STEPS, lambda: annotate(frozen, noise))
    ra3 = report("RA3, after the M-phase", policy)
    print(f"RA3 is {ra3 - ntp:+.3f} nats per expert line above next-token prediction of as many updates.")


if __name__ == "__main__":
    main()
