"""Classifiers on frozen features: k-NN, DINOv2's linear grid, nearest mean, logistic regression.

The first two are for a labelled set with a train, a validation and a test part (specified in DINOv2's evaluation); the
others for few-shot episodes, of which each has its own small support set.
"""

import numpy as np
import torch
import torch.nn.functional as F

from frames.packed import image_order
from scores.metrics import confusion, macro_f1

KNN_TEMPERATURE, KNN_K = 0.07, (10, 20, 100, 200)  # DINO's
CANDIDATES = 10.0 ** np.arange(-4, 4)  # logistic regression's inverse penalties, for cross-validation
LINEAR_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # at a batch of 256


def validation_f1(scores, labels):
    """Macro F1 of scores (..., n, K) as tensors: what every choice of a setting or an epoch goes by. (...)"""
    predictions = scores.argmax(-1).cpu().numpy()
    return macro_f1(confusion(np.asarray(labels), predictions, scores.shape[-1]))


# ---------------------------------------------------------------- with train and validation parts

def neighbour_votes(queries, bank, labels, n_classes, ks, temperature=KNN_TEMPERATURE):
    """DINO's k-NN: the k bank images of largest cosine vote with weight exp(cosine / temperature).

    queries (n, d), bank (m, d), labels (m,) -> votes (len(ks), n, K), each row summing to 1.
    """
    bank, votes = F.normalize(bank, dim=1), []
    for part in F.normalize(queries, dim=1).split(1024):
        cosines, nearest = (part @ bank.T).topk(max(ks), dim=1)  # (b, max k), the nearest first
        weights = ((cosines - 1) / temperature).exp()
        rows = []
        for k in ks:
            row = part.new_zeros(len(part), n_classes).scatter_add_(1, labels[nearest[:, :k]], weights[:, :k])
            rows.append(row / row.sum(1, keepdim=True))
        votes.append(torch.stack(rows))
    return torch.cat(votes, dim=1)


def knn(features, labels, train, val, n_classes):
    """Features (n, L + 1, C), labels (n,), index arrays -> (votes of every image (n, K), {"k": of the best macro F1}).

    The features are the last class tokens, or a foreign model's vectors. Train images find themselves: only what is in
    another part counts.
    """
    x = features[:, -2] if features.shape[1] > 1 else features[:, 0]
    ks = sorted({min(k, len(train)) for k in KNN_K})
    votes = neighbour_votes(x, x[train], torch.from_numpy(labels[train]), n_classes, ks)  # (ks, n, K)
    f1 = validation_f1(votes[:, val], labels[val])
    best = int(f1.argmax())
    return votes[best], {"k": ks[best], "validation macro F1": float(f1[best])}


def feature_variants(features):
    """DINOv2's four inputs of a linear head from (n, L + 1, C): {words: (n, d)}; a foreign model's (n, 1, d): one."""
    n, layers = len(features), features.shape[1] - 1
    if layers == 0:
        return {"vector": features[:, 0]}
    variants = {}
    for blocks in sorted({1, layers}):
        words, cls = f"last {blocks} block{'s' * (blocks > 1)}", features[:, layers - blocks:layers].reshape(n, -1)
        variants[words] = cls
        variants[f"{words} + average pool"] = torch.cat((cls, features[:, layers]), dim=1)
    return variants


def linear_grid(features, labels, train, val, n_classes, steps, batch_size, seed, device):
    """DINOv2's linear evaluation: a head for every input and learning rate, all trained at once, best on validation.

    SGD with momentum 0.9, no weight decay, cosine to 0, rates times batch / 256, weights from N(0, 0.01), batches of
    all inputs the same. Frozen features stand still, so there is no augmentation. Features (n, L + 1, C), labels (n,),
    index arrays -> (probabilities of every image (n, K), {"head", "validation macro F1"}).
    """
    batch_size = min(batch_size, len(train))
    targets = torch.from_numpy(labels[train]).to(device)
    rates = torch.tensor(LINEAR_RATES, device=device).view(-1, 1, 1) * batch_size / 256  # (rates, 1, 1)
    per_epoch, generator = len(train) // batch_size, torch.Generator().manual_seed(seed)
    heads = []
    for words, x in feature_variants(features).items():
        x = torch.cat((x, torch.ones(len(x), 1)), dim=1).to(device)  # (n, d + 1): the bias comes last
        weight = torch.randn(len(LINEAR_RATES), x.shape[1], n_classes, generator=generator) * 0.01
        weight[:, -1] = 0
        heads.append((words, x, x[torch.from_numpy(train).to(device)], weight.to(device)))
    velocities = [torch.zeros_like(weight) for *_, weight in heads]
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = image_order(np.arange(len(train)), seed, epoch)
        rows = torch.from_numpy(order[place * batch_size:(place + 1) * batch_size]).to(device)
        onehot = F.one_hot(targets[rows], n_classes).float()  # (b, K)
        decay = 0.5 * (1 + np.cos(np.pi * step / steps))
        for (_, _, x, weight), velocity in zip(heads, velocities):
            logits = torch.einsum("bd,rdk->rbk", x[rows], weight)  # (rates, b, K)
            gradient = torch.einsum("bd,rbk->rdk", x[rows], (logits.softmax(2) - onehot) / batch_size)
            velocity.mul_(0.9).add_(gradient)
            weight.sub_(rates * decay * velocity)
    best = None
    for words, x, _, weight in heads:
        scores = torch.einsum("nd,rdk->rnk", x, weight).softmax(2).cpu()  # (rates, n, K)
        f1 = np.where(scores.isfinite().all((1, 2)).numpy(), validation_f1(scores[:, val], labels[val]), -1)
        top = int(f1.argmax())
        if best is None or f1[top] > best[1]["validation macro F1"]:
            best = scores[top], {"head": f"{words}, rate {LINEAR_RATES[top]:g}", "validation macro F1": float(f1[top])}
    return best


# ---------------------------------------------------------------- of episodes: x (n, d), support (E, K, k) -> (E, n)

def nearest_mean(x, support):
    """Class of the nearest mean of L2-normalised support features."""
    x, predictions = F.normalize(x, dim=1), []
    for rows in support:  # (K, k)
        means = x[rows].mean(1)  # (K, d)
        predictions.append((x @ means.T - means.square().sum(1) / 2).argmax(1))  # |x - m|^2 without |x|^2
    return torch.stack(predictions)


def nearest_neighbours(x, support, temperature=KNN_TEMPERATURE):
    """The min(k, 5) support images of largest cosine vote with weight exp(cosine / temperature), as in DINO."""
    x, predictions = F.normalize(x, dim=1), []
    K, k = support.shape[1:]
    for rows in support:
        cosines, nearest = (x @ x[rows.flatten()].T).topk(min(k, 5), dim=1)  # (n, min(k, 5))
        votes = x.new_zeros(len(x), K).scatter_add_(1, nearest // k, (cosines / temperature).exp())  # (n, K)
        predictions.append(votes.argmax(1))
    return torch.stack(predictions)


def logistic_regression(x, support, C):
    """Multinomial logistic regression on features standardised by the support set, as `fit_logistic` fits it."""
    x = x.double()
    C = choose_C(x, support) if C == "support" else torch.tensor(C, dtype=torch.float64)
    weight, bias = fit_logistic(x, support, C.expand(len(support)))
    return torch.stack([(x @ w + b).argmax(1) for w, b in zip(weight, bias)])


def fit_logistic(x, support, C):
    """Minimise |W|^2 / 2 + C * cross-entropy on E support sets: weights (E, d, K), biases (E, K) for float64 x as is.

    |W| is of standardised features; this is scikit-learn's LogisticRegression(C) after StandardScaler, with a C (E,)
    for each set. The best W is a combination of the support rows (a part of W orthogonal to them costs penalty and
    changes no logit), so it is found exactly in their span, of at most K * k dimensions instead of d.
    """
    E, K, k = support.shape
    limit = max(1, 2 ** 24 // (K * k * x.shape[1]))  # episodes at a time, for memory
    if E > limit:
        parts = [fit_logistic(x, rows, c) for rows, c in zip(support.split(limit), C.split(limit))]
        return tuple(torch.cat(part) for part in zip(*parts))
    z = x[support.flatten(1)]  # (E, S, d), S = K * k rows sorted by class
    center, scale = z.mean(1, keepdim=True), z.std(1, correction=0, keepdim=True)  # (E, 1, d)
    scale = torch.where(scale > 1e-6 * (1 + center.abs()), scale, 1.0)  # a constant feature stays zero
    # two classes: scikit-learn has one weight vector for both, which is penalised half as much as softmax's two
    root = (C / 2 if K == 2 else C).sqrt().view(-1, 1, 1)
    basis, coordinates = torch.linalg.qr(((z - center) / scale).mT)  # (E, d, r), (E, r, S)
    z = root * coordinates.mT  # (E, S, r): in units of W / sqrt(C) the penalty has curvature one whatever C is
    z = torch.cat((z, torch.ones_like(z[..., :1])), dim=2)  # (E, S, r + 1), the bias last
    ridge = torch.ones(z.shape[2], 1, dtype=torch.float64)
    ridge[-1] = 0  # the bias is not penalised
    solution = minimise(z, torch.eye(K, dtype=torch.float64).repeat_interleave(k, dim=0), ridge)  # (E, r + 1, K)
    weight = basis @ (root * solution[:, :-1]) / scale.mT  # (E, d, K)
    return weight, solution[:, -1] - (center @ weight)[:, 0]


def minimise(z, targets, ridge):
    """Newton's method for cross-entropy(z @ w, targets) + ridge * w^2 / 2 of E problems side by side: w (E, r, K).

    Steps come from conjugate gradients: no Hessian is stored, and a step shrinks until its problem's loss falls.
    """
    def loss(w):
        logits = z @ w  # (E, S, K)
        return (logits.logsumexp(2) - (logits * targets).sum(2)).sum(1) + (ridge * w * w).sum((1, 2)) / 2  # (E,)

    w = z.new_zeros(len(z), z.shape[2], targets.shape[1])
    for _ in range(100):
        p = (z @ w).softmax(2)  # (E, S, K)
        gradient = z.mT @ (p - targets) + ridge * w
        if gradient.abs().max() < 1e-8:
            return w

        def curvature(v):  # Hessian times v
            v_logits = p * (z @ v)
            return z.mT @ (v_logits - p * v_logits.sum(2, keepdim=True)) + ridge * v

        step = conjugate_gradients(curvature, gradient)
        before, slope, size = loss(w), (gradient * step).sum((1, 2)), z.new_ones(len(z))
        for _ in range(30):
            after = loss(w - size.view(-1, 1, 1) * step)
            uphill = after > before - 1e-4 * size * slope + 1e-12 * before.abs()  # rounding is no ascent
            if not uphill.any():
                break
            size[uphill] /= 2
        w = w - size.view(-1, 1, 1) * step
    raise ValueError(f"logistic regression did not converge (gradient {gradient.abs().max():.0e}): lower --C")


def conjugate_gradients(matrix, right, iterations=200):
    """Solve matrix(x) = right for symmetric positive semi-definite operators on (E, r, K), to a thousandth."""
    def dot(a, b):
        return (a * b).sum((1, 2), keepdim=True)  # (E, 1, 1)

    x, residual = torch.zeros_like(right), right
    direction, square = right, dot(right, right)
    goal = (1e-6 * square).clamp(min=1e-20)
    for _ in range(iterations):
        active = square > goal  # a solved system stands still: what is left of its residual is rounding
        if not active.any():
            break
        product = matrix(direction)
        size = torch.where(active, square / dot(direction, product), 0)
        x, residual = x + size * direction, residual - size * product
        square, old = torch.where(active, dot(residual, residual), square), square
        direction = residual + square / old * direction
    return x


def choose_C(x, support, candidates=CANDIDATES):
    """Per episode the C of the least cross-entropy on left-out support images, (E,); 1 where a class has one image."""
    if support.shape[2] == 1:
        return torch.ones(len(support), dtype=torch.float64)
    return torch.from_numpy(candidates)[left_out_losses(x, support, candidates).argmin(0)]


def left_out_losses(x, support, candidates):
    """Cross-entropy, summed over left-out support images, of each C: (candidates, E).

    min(k, 5) folds, each leaving out the same number of images of every class. Where a class has fewer than k
    patients, folds share patients, and C comes out large; the scores are still of other patients.
    """
    E, K, k = support.shape
    losses = torch.zeros(len(candidates), E, dtype=torch.float64)
    targets = torch.arange(K)[:, None]
    for fold in range(min(k, 5)):
        out = torch.arange(k) % min(k, 5) == fold
        held = x[support[:, :, out].flatten(1)]  # (E, K * left out, d)
        for i, C in enumerate(candidates):
            weight, bias = fit_logistic(x, support[:, :, ~out], torch.full((E,), C, dtype=torch.float64))
            logits = held @ weight + bias[:, None]  # (E, K * left out, K)
            labels = targets.expand(K, int(out.sum())).flatten().expand(E, -1)
            losses[i] += F.cross_entropy(logits.mT, labels, reduction="none").sum(1)
    return losses


def linear_probe(features, support):
    """Logistic regression on one of DINOv2's inputs: features (n, L + 1, C), support (E, K, k) -> (E, n).

    The input and C are chosen together, per episode, by `left_out_losses`. Where a class has one image nothing can be
    left out: the last block with average pool, and C = 1.
    """
    variants = [x.double() for x in feature_variants(features).values()]
    if support.shape[2] == 1:
        return logistic_regression(variants[min(1, len(variants) - 1)], support, 1.0)
    losses = torch.stack([left_out_losses(x, support, CANDIDATES) for x in variants])  # (variants, candidates, E)
    best = losses.flatten(0, 1).argmin(0)  # (E,)
    predictions = torch.zeros(len(support), len(features), dtype=torch.long)
    for number, x in enumerate(variants):
        own = torch.nonzero(best // len(CANDIDATES) == number)[:, 0]  # the episodes that chose this input
        if len(own):
            weight, bias = fit_logistic(x, support[own], torch.from_numpy(CANDIDATES)[best[own] % len(CANDIDATES)])
            predictions[own] = torch.stack([(x @ w + b).argmax(1) for w, b in zip(weight, bias)])
    return predictions


