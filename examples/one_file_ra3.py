"""RA3 in one file, on a toy, in plain torch: `python examples/one_file_ra3.py` (seconds, on one core).
Paper: Learning to Reason as Action Abstractions with Scalable Mid-Training RL, https://huggingface.co/papers/2509.25810

The expert writes blocks of two lines, given a state (kind, u, v). An easy block copies u. A hard one depends on u + v
mod K, which the policy cannot compute while it writes a line (additive in u and v), but can if it thinks first: a
latent z is drawn from a table over (u, v), and the lines see z. That is rigged on purpose: it is the situation that
RA3 is for, and says nothing about how common it is in real code.

The base has read code with comments and knows what follows one, but its own are random. In a language model the gate
is the probability of "#", and lines are divided by that of not thinking; here the gate is a head of its own.
"""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F


K, LINES, G = 8, 2, 4  # symbols; lines that a latent serves (the horizon H); latents sampled at each boundary
PENALTY, DISCOUNT, BATCH, E_STEPS, M_STEPS = 0.2, 0.9, 256, 400, 200
EASY, HARD, NO_LATENT = 0, 1, K


class Policy(nn.Module):
    """Gate P(think | s), latents pi(z | s), lines pi(a | s, z). Shapes: B blocks, G latents, H lines, K symbols."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Embedding(2, 1)  # by kind; a log-odds
        self.latent = nn.Embedding(2 * K * K, K)  # by kind, u, v
        self.of_u, self.of_v = nn.Embedding(2 * K, LINES * K), nn.Embedding(2 * K, LINES * K)
        self.of_z = nn.Embedding(2 * (K + 1), LINES * K)
        for table in self.children():
            nn.init.zeros_(table.weight)

    def latent_logps(self, s):
        kind, u, v = s
        return self.latent((kind * K + u) * K + v).log_softmax(-1)

    def line_logps(self, s, lines_BH, z):
        """log pi of each expert line `[B, H]` under latents `z` `[B]`; the latent persists over the lines."""
        kind, u, v = s
        logits = self.of_u(kind * K + u) + self.of_v(kind * K + v) + self.of_z(kind * (K + 1) + z)
        return logits.view(-1, LINES, K).log_softmax(-1).gather(-1, lines_BH[..., None])[..., 0]


def expert(noise, count=BATCH):
    """Blocks of expert text: states and lines `[B, H]`, and the comment that would help."""
    kind, u, v = (torch.randint(n, (count,), generator=noise) for n in (2, K, K))
    topic = (u + v) % K
    hard = torch.stack([(3 * topic + 1) % K, (5 * topic + 2) % K], 1)
    return (kind, u, v), torch.where(kind[:, None] == HARD, hard, u[:, None]), topic


def next_token_loss(policy, s, lines_BH, z, trains_latents=True):
    """Cross-entropy of text: think or not, the latent if there is one, the lines."""
    thinks = z != NO_LATENT
    loss = F.binary_cross_entropy_with_logits(policy.gate(s[0])[:, 0], thinks.float(), reduction="sum")
    if trains_latents:
        loss = loss - policy.latent_logps(s).gather(1, z.clamp(max=K - 1)[:, None])[thinks].sum()
    return (loss - policy.line_logps(s, lines_BH, z).sum()) / lines_BH.numel()


def base_model(noise):
    """Has read text with a right comment before 3 blocks in 10; its own comments stay random."""
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    for _ in range(300):
        s, lines, topic = expert(noise)
        z = torch.where(torch.rand(BATCH, generator=noise) < 0.3, topic, NO_LATENT)
        optimizer.zero_grad()
        next_token_loss(policy, s, lines, z, trains_latents=False).backward()
        optimizer.step()
    return policy


def e_phase(policy, noise):
    """Self-supervised RL: latents that make the expert's next lines likelier than they cost."""
    optimizer = torch.optim.Adam([*policy.gate.parameters(), *policy.latent.parameters()], lr=0.02)
    weight_H = DISCOUNT ** torch.arange(LINES)
    average, hold = None, True
    for _ in range(E_STEPS):
        s, lines, _ = expert(noise)
        with torch.no_grad():  # rollouts and rewards: returns over H lines, with each latent and without
            z_BG = torch.multinomial(policy.latent_logps(s).exp(), G, replacement=True, generator=noise)
            returns_BG = torch.stack([policy.line_logps(s, lines, z) @ weight_H for z in z_BG.T], 1)
            act_B = policy.line_logps(s, lines, torch.full((BATCH,), NO_LATENT)) @ weight_H
            gain_B = returns_BG.mean(1) - act_B
            # Against the mean of the others (leave one out); the penalty cancels.
            advantage_BG = returns_BG - (returns_BG.sum(1, keepdim=True) - returns_BG) / (G - 1)
        p_B = policy.gate(s[0])[:, 0].sigmoid()
        # J = (1 - p) G_act + p (mean_g G_g - c) goes through p alone, analytically. While latents are mostly wrong it
        # would push p to 0 and nothing would be learned from thinking: until they pay, p may only go up.
        gains = float((p_B * gain_B).sum().detach() / p_B.sum().detach())
        average = gains if average is None else 0.8 * average + 0.2 * gains
        hold = hold and average <= PENALTY
        gate = (p_B * ((gain_B - PENALTY).clamp(min=0) if hold else gain_B - PENALTY)).mean()
        policy_gradient = (advantage_BG * policy.latent_logps(s).gather(1, z_BG)).mean()
        optimizer.zero_grad()
        (-gate - policy_gradient).backward()
        optimizer.step()


def m_phase(policy, noise, steps, annotated=True):
    """Next-token prediction on the text with the policy's own latents spliced in, or on the plain text."""
    frozen = deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(steps):
        s, lines, _ = expert(noise)
        z = torch.full((BATCH,), NO_LATENT)
        if annotated:
            with torch.no_grad():
                thinks = torch.rand(BATCH, generator=noise) < frozen.gate(s[0])[:, 0].sigmoid()
                drawn = torch.multinomial(frozen.latent_logps(s).exp(), 1, generator=noise)[:, 0]
            z = torch.where(thinks, drawn, z)
        optimizer.zero_grad()
        next_token_loss(policy, s, lines, z).backward()
        optimizer.step()


@torch.no_grad()
def report(name, policy):
    """P(think), and the exact held-out log-likelihood of a line: latents are few enough to be summed over."""
    s, lines, _ = expert(torch.Generator().manual_seed(1), 4096)
    logit, logps = policy.gate(s[0])[:, 0], policy.latent_logps(s)
    gate = {NO_LATENT: F.logsigmoid(-logit)} | {z: F.logsigmoid(logit) + logps[:, z] for z in range(K)}
    rows = [log_prior + policy.line_logps(s, lines, torch.full((4096,), z)).sum(1) for z, log_prior in gate.items()]
    likelihood = float(torch.stack(rows).logsumexp(0).mean()) / LINES
    think = [float(logit[s[0] == kind].sigmoid().mean()) for kind in (EASY, HARD)]
    print(f"{name:34} P(think) easy {think[0]:.3f}  hard {think[1]:.3f}   nats per expert line {likelihood:+.3f}")
    return likelihood


def main():
    noise = torch.Generator().manual_seed(0)
    policy = base_model(noise)
    report("base", policy)
    plain = deepcopy(policy)
    m_phase(plain, noise, E_STEPS + M_STEPS, annotated=False)
    ntp = report("next-token prediction", plain)
    e_phase(policy, noise)
    report("RA3, after the E-phase", policy)
    m_phase(policy, noise, M_STEPS)
    ra3 = report("RA3, after the M-phase", policy)
    print(f"RA3 is {ra3 - ntp:+.3f} nats per expert line above next-token prediction of as many updates.")


if __name__ == "__main__":
    main()
