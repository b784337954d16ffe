"""Classifiers on frozen features against scikit-learn, torch's own SGD and spelled-out loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from frames.packed import image_order
from training import probes
from training.features import few_shot_vector


def blobs(n, d, K, spread, seed=0):
    """Features around K random centres, labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % K
    return torch.from_numpy(rng.normal(size=(K, d))[labels] + spread * rng.normal(size=(n, d)) + 2), labels


def layered(n, layers, C, K, spread):
    """Features float32 (n, layers + 1, C), each layer telling the class by other noise, and labels."""
    parts = [blobs(n, C, K, spread, seed=i)[0] for i in range(layers + 1)]
    return torch.stack(parts, 1).float(), np.arange(n) % K


def supports(labels, shots, episodes=3):
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([[rng.choice(np.flatnonzero(labels == k), shots, replace=False)
                                       for k in range(labels.max() + 1)] for _ in range(episodes)]))  # (E, K, k)


# ---------------------------------------------------------------- train, validation and test parts

PARTS = np.arange(0, 60), np.arange(60, 90), np.arange(90, 120)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_inputs_of_linear_heads(layers):
    x = torch.randn(3, layers + 1, 5)
    last, pooled, *more = probes.feature_variants(x).values()
    assert torch.equal(last, x[:, layers - 1]) and torch.equal(pooled, torch.cat((x[:, layers - 1], x[:, layers]), 1))
    assert torch.equal(pooled, few_shot_vector(x)), "few-shot's vector is one of them"
    assert len(more) == (0 if layers == 1 else 2)
    for blocks, patches in zip(more, (0, 1)):
        assert torch.equal(blocks, torch.cat([x[:, i] for i in range(layers + patches)], 1))
    names = list(probes.feature_variants(x))
    assert names[:2] == ["last 1 block", "last 1 block + average pool"]
    assert names[2:] == [f"last {layers} blocks", f"last {layers} blocks + average pool"][:len(more)]


def test_a_foreign_models_vector_is_the_only_input():
    x = torch.randn(3, 1, 5)
    (words, only), = probes.feature_variants(x).items()
    assert words == "vector" and torch.equal(only, x[:, 0])


@pytest.mark.parametrize("ks", [(1, 3, 7), (60,)])
def test_votes_of_neighbours_are_scikit_learns(ks):
    x, labels = blobs(120, 6, 4, spread=1.5)
    train, _, test = PARTS
    votes = probes.neighbour_votes(x[test], x[train], torch.from_numpy(labels[train]), 4, ks)  # (ks, n, K)
    assert votes.shape == (len(ks), 30, 4)
    for k, own in zip(ks, votes):
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        np.testing.assert_allclose(own, oracle.fit(x[train], labels[train]).predict_proba(x[test]), atol=1e-6)


def test_knn_takes_the_last_class_token_and_the_k_best_on_validation():
    x, labels = layered(120, 3, 6, 4, spread=1.5)
    train, val, _ = PARTS
    scores, how = probes.knn(x, labels, train, val, 4)
    f1 = {}
    for k in (10, 20, 60):  # 100 and 200 are more than there are
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        votes = oracle.fit(x[train, 2], labels[train]).predict_proba(x[:, 2])
        f1[k] = f1_score(labels[val], votes[val].argmax(1), average="macro")
        if how["k"] == k:
            np.testing.assert_allclose(scores, votes, atol=1e-4)
    assert how == {"k": max(f1, key=f1.get), "validation macro F1": pytest.approx(max(f1.values()))}
    foreign = probes.knn(x[:, 2:3], labels, train, val, 4)
    assert torch.equal(foreign[0], scores) and foreign[1] == how


@pytest.mark.parametrize("layers, batch_size", [(3, 16), (0, 60), (1, 1000)])
def test_linear_grid_against_torchs_sgd_head_by_head(layers, batch_size, monkeypatch):
    """Heads trained one by one; the one of the largest macro F1 on validation, the first of equals."""
    rates = [float(f"{digit}e{power}") for power in range(-5, 0) for digit in (1, 2, 5)]
    assert probes.LINEAR_RATES == tuple(rates[:13])
    monkeypatch.setattr(probes, "LINEAR_RATES", (2e-3, 0.5, 5.0))
    x, labels = layered(120, layers, 6, 3, spread=2.0)
    train, val, _ = PARTS
    steps, seed, batch = 8, 5, min(batch_size, 60)
    scores, how = probes.linear_grid(x, labels, train, val, 3, steps, batch_size, seed, torch.device("cpu"))
    assert scores.shape == (120, 3)
    generator, found = torch.Generator().manual_seed(seed), []
    for words, inputs in probes.feature_variants(x).items():
        start = torch.randn(3, inputs.shape[1] + 1, 3, generator=generator) * 0.01
        for rate, weight in zip(probes.LINEAR_RATES, start):
            head = torch.nn.Linear(inputs.shape[1], 3)
            with torch.no_grad():
                head.weight.copy_(weight[:-1].T)
                head.bias.zero_()
            optimizer = torch.optim.SGD(head.parameters(), lr=rate * batch / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            order, targets = [], torch.from_numpy(labels)
            for step in range(steps):
                if len(order) < batch:
                    order = train[image_order(np.arange(60), seed, step // (60 // batch))]
                    order = order[:60 // batch * batch]
                rows, order = order[:batch], order[batch:]
                optimizer.zero_grad()
                F.cross_entropy(head(inputs[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
            p = head(inputs).softmax(1).detach()
            found.append((f1_score(labels[val], p[val].argmax(1), average="macro"), f"{words}, rate {rate:g}", p))
    f1, words, p = max(found, key=lambda head: head[0])
    assert how["head"] == words and how["validation macro F1"] == pytest.approx(f1, abs=1e-9)
    torch.testing.assert_close(scores, p, atol=1e-5, rtol=0)
    assert len({round(head[0], 6) for head in found}) > 1, "all heads alike: nothing was chosen"


@pytest.mark.parametrize("probe", [
    probes.knn, lambda *given: probes.linear_grid(*given, steps=12, batch_size=20, seed=0, device=torch.device("cpu"))])
def test_choices_see_validation_and_nothing_of_the_test(probe):
    x, labels = layered(120, 3, 6, 3, spread=3.0)
    train, val, test = PARTS
    scores, how = probe(x, labels, train, val, 3)
    x2, labels2 = x.clone(), labels.copy()
    x2[test], labels2[test] = torch.randn(30, 4, 6), np.random.default_rng(0).permutation(labels[test])
    again, how2 = probe(x2, labels2, train, val, 3)
    assert how2 == how and torch.equal(again[val], scores[val])
    labels2[val] = np.roll(labels2[val], 1)  # but other validation labels are another choice, or at least another score
    assert probe(x, labels2, train, val, 3)[1] != how


def test_a_head_that_diverges_is_not_chosen():
    x, labels = layered(120, 0, 6, 3, spread=1.0)
    scores, how = probes.linear_grid(x * 1e20, labels, *PARTS[:2], 3, 30, 60, 0, torch.device("cpu"))
    assert scores.isfinite().all() or how["validation macro F1"] == -1
    x[:, 0, 0] = 1e19  # large rates overflow, small ones do not
    scores, how = probes.linear_grid(x, labels, *PARTS[:2], 3, 30, 60, 0, torch.device("cpu"))
    assert scores.isfinite().all() and how["validation macro F1"] > 0


# ---------------------------------------------------------------- few-shot episodes

@pytest.mark.parametrize("d, K, shots, C", [(60, 6, 5, 1.0), (60, 6, 1, 1.0), (5, 3, 20, 1.0), (60, 2, 5, 1.0),
                                            (60, 4, 5, 0.01), (60, 4, 5, 100.0), (2, 3, 2, 1e4)])
def test_logistic_regression_is_scikit_learns(d, K, shots, C):
    x, labels = blobs(200, d, K, spread=1.0)
    x[:, 1] = 0.3  # a constant feature has no standard deviation to divide by
    support = supports(labels, shots)
    weight, bias = probes.fit_logistic(x, support, torch.full((3,), C, dtype=torch.float64))
    for w, b, rows in zip(weight, bias, support.flatten(1)):
        scaler = StandardScaler().fit(x[rows])
        oracle = LogisticRegression(C=C, tol=1e-9, max_iter=20000).fit(scaler.transform(x[rows]), labels[rows])
        actual, expected = (x @ w + b).softmax(1).numpy(), oracle.predict_proba(scaler.transform(x))
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_logistic_regression_in_parts_and_per_episode_C():
    x, labels = blobs(60, 8, 3, spread=1.0)
    support, C = supports(labels, 4, episodes=5), torch.tensor([0.01, 0.1, 1, 10, 100], dtype=torch.float64)
    weight, bias = probes.fit_logistic(x, support, C)
    for i in range(5):  # one at a time
        alone = probes.fit_logistic(x, support[i:i + 1], C[i:i + 1])
        torch.testing.assert_close((weight[i], bias[i]), (alone[0][0], alone[1][0]), atol=1e-6, rtol=1e-6)
    predictions = probes.logistic_regression(x.float(), support, 1.0)
    expected = probes.fit_logistic(x.float().double(), support, torch.ones(5, dtype=torch.float64))
    assert (predictions == torch.stack([(x.float().double() @ w + b).argmax(1) for w, b in zip(*expected)])).all()


def test_steps_shrink_where_newtons_overshoot():
    """Few rows of very unequal length: with full steps the logits run off to infinity."""
    z = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1000
    z = torch.cat((z.sign() * z.abs() ** 1.5 / 1000 ** 0.5, torch.ones(1, 12, 1, dtype=torch.float64)), dim=2)
    targets, ridge = torch.eye(6, dtype=torch.float64).repeat_interleave(2, dim=0), torch.tensor([[1.0], [1], [1], [0]])
    w = probes.minimise(z, targets, ridge.double())
    gradient = z.mT @ ((z @ w).softmax(2) - targets) + ridge * w
    assert gradient.abs().max() < 1e-7


def oracle_losses(x, rows, labels, candidates):
    """Cross-entropy on left-out support images of each C, by scikit-learn, for one episode's rows (K, k)."""
    losses = []
    for candidate in candidates:
        losses.append(0.0)
        for fold in range(min(rows.shape[1], 5)):
            out = np.arange(rows.shape[1]) % 5 == fold
            train, test = rows[:, ~out].flatten(), rows[:, out].flatten()
            scaler = StandardScaler().fit(x[train])
            oracle = LogisticRegression(C=candidate, tol=1e-9, max_iter=5000)
            oracle.fit(scaler.transform(x[train]), labels[train])
            p = oracle.predict_proba(scaler.transform(x[test]))
            losses[-1] -= np.log(p[np.arange(len(test)), labels[test]]).sum()
    return losses


def test_C_is_chosen_by_cross_validation_on_the_support():
    x, labels = blobs(90, 12, 3, spread=2.0)
    support, candidates = supports(labels, 7, episodes=2), [1e-3, 1e-2, 1e-1, 1.0]
    chosen = probes.choose_C(x, support, np.array(candidates))
    for C, rows in zip(chosen, support):
        assert C == candidates[np.argmin(oracle_losses(x, rows, labels, candidates))]
    assert (probes.choose_C(x, supports(labels, 1)) == 1).all()  # nothing to leave out


def test_linear_probe_chooses_input_and_C_on_the_support(monkeypatch):
    candidates = np.array([1e-2, 1.0])
    monkeypatch.setattr(probes, "CANDIDATES", candidates)
    x, labels = layered(60, 3, 6, 3, spread=0.5)
    x[:30, :2], x[30:, 2:] = torch.randn(30, 2, 6), torch.randn(30, 2, 6)  # each half of the images lacks some layers
    support, chosen = torch.cat((supports(labels[:30], 3, 2), supports(labels[30:], 3, 2) + 30)), set()
    predictions = probes.linear_probe(x, support)
    assert predictions.shape == (4, 60)
    for rows, own in zip(support, predictions):
        losses = {}
        for words, inputs in probes.feature_variants(x.double()).items():
            for C, loss in zip(candidates, oracle_losses(inputs, rows, labels, candidates)):
                losses[words, C] = loss
        words, C = min(losses, key=losses.get)
        chosen.add(words)
        inputs, rows = probes.feature_variants(x.double())[words], rows.flatten()
        scaler = StandardScaler().fit(inputs[rows])
        oracle = LogisticRegression(C=C, tol=1e-9, max_iter=5000).fit(scaler.transform(inputs[rows]), labels[rows])
        assert (own.numpy() == oracle.predict(scaler.transform(inputs))).all()
    assert len(chosen) > 1, "one input for all episodes: the test does not see the choice"


def test_linear_probe_of_one_shot_is_logistic_regression_of_few_shots_vector():
    x, labels = layered(60, 3, 6, 3, spread=1.0)
    support = supports(labels, 1)
    assert torch.equal(probes.linear_probe(x, support), probes.logistic_regression(few_shot_vector(x), support, 1.0))
    assert torch.equal(probes.linear_probe(x[:, :1], support), probes.logistic_regression(x[:, 0], support, 1.0))


@pytest.mark.parametrize("shots", [1, 3, 8])
def test_nearest_mean_and_neighbours_against_loops(shots):
    x, labels = blobs(80, 6, 4, spread=1.5)
    support = supports(labels, shots)
    mean, neighbours = probes.nearest_mean(x, support), probes.nearest_neighbours(x, support)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for e, rows in enumerate(support.numpy()):
        for i in range(80):
            distances = [np.linalg.norm(unit[i] - unit[images].mean(0)) for images in rows]
            assert mean[e, i] == np.argmin(distances)
            nearest = sorted(rows.flatten(), key=lambda j: -unit[i] @ unit[j])[:min(shots, 5)]
            votes = np.zeros(4)
            for j in nearest:
                votes[labels[j]] += np.exp(unit[i] @ unit[j] / 0.07)
            assert neighbours[e, i] == np.argmax(votes)
