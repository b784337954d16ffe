"""Boxes and points from maps, and the losses of four kinds of tasks: against loops and definitions."""

import itertools

import numpy as np
import pytest
import torch

from labelled.fmc_uia import Task
from networks import heads
from networks.heads import box_loss, boxes_of, giou, point_loss, points_of, task_loss

TASKS = [Task("seg", "segmentation", 3), Task("cls", "classification", 4), Task("det", "detection", 1),
         Task("reg", "regression", 2)]
f64 = torch.float64


def draw(*shape):
    return torch.randn(*shape, dtype=f64)


def random_boxes(n, seed=0):
    a, b = np.random.default_rng(seed).random((2, n, 2))
    return torch.from_numpy(np.concatenate((np.minimum(a, b), np.maximum(a, b)), 1))


# ---------------------------------------------------------------- boxes

@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_a_box_is_valid_whatever_the_maps(scale, dtype):
    for rows, columns in ((1, 1), (3, 5), (16, 16)):
        maps = scale * torch.randn(200, 5, rows, columns, dtype=dtype)
        maps[:50] = scale * maps[:50].sign()
        boxes, weights = boxes_of(maps)
        x_min, y_min, x_max, y_max = boxes.unbind(1)
        assert boxes.isfinite().all() and (x_min <= x_max).all() and (y_min <= y_max).all()
        slack = 8 * torch.finfo(dtype).eps  # of the weights' sum
        assert boxes.min() >= 0 and boxes.max() <= 1 + slack
        assert (weights.double().exp().sum(1) - 1).abs().max() < 1e-5


def test_boxes_cell_by_cell():
    maps, rows, columns = 2 * draw(3, 5, 2, 4), 2, 4
    for own, found, logs in zip(maps, *boxes_of(maps)):
        total, box = 0.0, np.zeros(4)
        for i, j in itertools.product(range(rows), range(columns)):
            reach = [1 / (1 + np.exp(-own[k, i, j].item())) for k in range(4)]
            x, y = (j + 0.5) / columns, (i + 0.5) / rows
            share = np.exp(own[4, i, j].item())
            total += share
            box += share * np.array([x - reach[0] * x, y - reach[1] * y, x + reach[2] * (1 - x),
                                     y + reach[3] * (1 - y)])
        np.testing.assert_allclose(found, box / total, atol=1e-12)
        np.testing.assert_allclose(logs, (own[4] - np.log(total)).flatten(), atol=1e-12)


def maps_that_say(boxes, rows, columns):
    """(B, 5, rows, columns) of which each cell whose centre is in the box says just that box; others weigh nothing."""
    maps = torch.zeros(len(boxes), 5, rows, columns, dtype=f64)
    for own, (x_min, y_min, x_max, y_max) in zip(maps, boxes.tolist()):
        for i, j in itertools.product(range(rows), range(columns)):
            x, y = (j + 0.5) / columns, (i + 0.5) / rows
            own[4, i, j] = 0.0 if x_min < x < x_max and y_min < y < y_max else -1e3
            reach = torch.tensor([(x - x_min) / x, (y - y_min) / y, (x_max - x) / (1 - x), (y_max - y) / (1 - y)])
            own[:4, i, j] = reach.double().clamp(1e-9, 1 - 1e-9).logit()
    return maps


def test_a_perfect_box_loses_nothing_but_the_cells_evenness():
    boxes = torch.tensor([[0.13, 0.2, 0.52, 0.9], [0.05, 0.4, 0.95, 0.97]], dtype=f64)
    maps = maps_that_say(boxes, 6, 5)
    found, _ = boxes_of(maps)
    assert (found - boxes).abs().max() < 1e-7
    inside = (maps[:, 4] > -1).sum((1, 2))
    assert inside.tolist() == [8, 20]
    assert (box_loss(maps, boxes) - inside.log()).abs().max() < 1e-5  # uniform over n cells: log n is the least


def test_box_loss_part_by_part():
    maps, boxes = 2 * draw(6, 5, 4, 3), random_boxes(6)
    boxes[0] = torch.tensor([0.34, 0.26, 0.49, 0.36])  # between the centres: cell (1, 1) is nearest to its middle
    found, weights = boxes_of(maps)
    for b, own in enumerate(box_loss(maps, boxes)):
        x_min, y_min, x_max, y_max = boxes[b].tolist()
        columns = [j for j in range(3) if x_min <= (j + 0.5) / 3 <= x_max]
        rows = [i for i in range(4) if y_min <= (i + 0.5) / 4 <= y_max]
        columns = columns or [min(range(3), key=lambda j: abs((j + 0.5) / 3 - (x_min + x_max) / 2))]
        rows = rows or [min(range(4), key=lambda i: abs((i + 0.5) / 4 - (y_min + y_max) / 2))]
        cells = np.mean([-weights[b, 3 * i + j].item() for i in rows for j in columns])
        l1 = sum(abs(p - q) for p, q in zip(found[b].tolist(), boxes[b].tolist()))
        want = 5 * l1 + 2 * (1 - giou_by_hand(found[b].tolist(), boxes[b].tolist())) + cells
        assert abs(own.item() - want) < 1e-10, b
    assert rows != [1] or columns != [1]


def test_cells_outside_the_box_are_negatives(monkeypatch):
    """Cells in the box say just that box, others the nearest they can; one outside that weighs more loses more."""
    boxes = torch.tensor([[0.3, 0.3, 0.7, 0.8]], dtype=f64)
    maps = maps_that_say(boxes, 8, 8)
    inside = maps[:, 4].flatten() > -1
    maps[:, 4] = 0
    with monkeypatch.context() as patch:  # the cells' part alone: softmax minus target
        patch.setattr(heads, "L1_WEIGHT", 0.0)
        patch.setattr(heads, "GIOU_WEIGHT", 0.0)
        maps.requires_grad_()
        grad, = torch.autograd.grad(box_loss(maps, boxes).sum(), maps)
        want = torch.full((64,), 1 / 64, dtype=f64) - inside / inside.sum()
        assert (grad[0, 4].flatten() - want).abs().max() < 1e-12 and not grad[:, :4].any()
    grad, = torch.autograd.grad(box_loss(maps, boxes).sum(), maps)
    corner, middle = grad[0, 4, 0, 0], grad[0, 4, 4, 4]
    assert corner > 0 > middle
    losses = []
    for weight in (-3.0, 0.0, 3.0, 6.0):
        raised = maps.detach().clone()
        raised[0, 4, 0, 0] = weight
        losses.append(box_loss(raised, boxes).item())
    assert losses == sorted(losses) and losses[-1] > losses[0] + 3


def giou_by_hand(a, b):
    """Generalised IoU of two boxes given as four numbers each."""
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    wide, high = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    either = sum(area) - wide * high
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return wide * high / either - (hull - either) / hull


def test_giou_in_a_loop_and_by_counting_pixels():
    a, b = random_boxes(200), random_boxes(200, seed=1)
    want = [giou_by_hand(*pair) for pair in zip(a.tolist(), b.tolist())]
    np.testing.assert_allclose(giou(a, b), want, atol=1e-12)
    assert min(want) < -0.5 and max(want) > 0.5
    y, x = np.mgrid[:9, :9]
    rng = np.random.default_rng(2)
    for _ in range(200):
        boxes = [np.r_[low, rng.integers(low + 1, 10)] for low in rng.integers(0, 8, (2, 2))]
        masks = [(x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3]) for box in boxes]
        ys, xs = np.nonzero(masks[0] | masks[1])
        hull, either = (np.ptp(ys) + 1) * (np.ptp(xs) + 1), len(ys)
        want = (masks[0] & masks[1]).sum() / either - (hull - either) / hull
        got = giou(*(torch.from_numpy(box).double()[None] for box in boxes))
        assert abs(got.item() - want) < 1e-12
    assert torch.allclose(giou(a, a), torch.ones(200, dtype=f64))


@pytest.mark.parametrize("a, b", [((0.3, 0.2, 0.3, 0.7), (0.3, 0.2, 0.3, 0.7)), ((0.5,) * 4, (0.5,) * 4),
                                  ((0.2, 0.5, 0.9, 0.5), (0.1, 0.3, 0.6, 0.8)), ((0.0,) * 4, (1.0,) * 4),
                                  ((0.1, 0.1, 0.2, 0.2), (0.8, 0.8, 0.9, 0.9))])
def test_degenerate_boxes_have_a_loss_and_a_gradient(a, b):
    a, b = (torch.tensor([box], dtype=torch.float32).requires_grad_() for box in (a, b))
    value = giou(a, b)
    grads = torch.autograd.grad(value.sum(), (a, b))
    assert -1 <= value.item() <= 1 and all(grad.isfinite().all() for grad in grads), (value, grads)


# ---------------------------------------------------------------- points

def gaussian(points, h, w):
    """log of SIGMA's Gaussian around points (B, K, 2), not normalised: (B, K, h, w)."""
    y, x = np.mgrid[:h, :w] + 0.5
    x_of, y_of = points[:, :, 0, None, None].numpy(), points[:, :, 1, None, None].numpy()
    return torch.from_numpy(-((x / w - x_of) ** 2 + (y / h - y_of) ** 2) / (2 / 16 ** 2))


def test_points_are_means_of_their_maps():
    maps = torch.zeros(1, 2, 6, 9, dtype=f64)
    maps[0, 0, 4, 7] = maps[0, 1, 0, 2] = 1e3
    points, heat = points_of(maps)
    np.testing.assert_allclose(points[0], [[7.5 / 9, 4.5 / 6], [2.5 / 9, 0.5 / 6]], atol=1e-12)
    maps = draw(2, 3, 4, 5)
    points, heat = points_of(maps)
    for b, k in itertools.product(range(2), range(3)):
        share = np.exp(maps[b, k].numpy())
        share /= share.sum()
        x = sum(share[i, j] * (j + 0.5) / 5 for i in range(4) for j in range(5))
        y = sum(share[i, j] * (i + 0.5) / 4 for i in range(4) for j in range(5))
        np.testing.assert_allclose(points[b, k], [x, y], atol=1e-12)
        np.testing.assert_allclose(heat[b, k], np.log(share), atol=1e-12)


def test_point_loss_written_out_and_least_at_the_gaussian():
    points = torch.tensor([[[0.5, 0.45], [0.53, 0.48]]], dtype=f64)
    best = gaussian(points, 32, 40)
    least = point_loss(best, points).item()
    assert 0 <= least < 1e-9
    for _ in range(20):
        assert point_loss(best + 0.01 * draw(*best.shape), points).item() > least
    assert point_loss(best, points + 0.02).item() > 10 * 0.02 * 2
    maps, places = draw(2, 3, 5, 7), torch.rand(2, 3, 2, dtype=f64)
    target = gaussian(places, 5, 7).flatten(2).softmax(2)
    heat, found = maps.flatten(2).log_softmax(2), points_of(maps)[0]
    want = np.zeros((2, 3))
    for b, k in itertools.product(range(2), range(3)):
        for p, q in zip(target[b, k].tolist(), heat[b, k].tolist()):
            want[b, k] += p * (np.log(p) - q)
        want[b, k] += 10 * sum(abs(u - v) for u, v in zip(found[b, k].tolist(), places[b, k].tolist()))
    np.testing.assert_allclose(point_loss(maps, places), want.mean(1), atol=1e-10)


def test_missing_points_count_nothing():
    maps, points = draw(3, 4, 6, 6).requires_grad_(), torch.rand(3, 4, 2, dtype=f64)
    points[0, 1], points[0, 2, 1], points[1] = np.nan, np.nan, np.nan
    loss = point_loss(maps, points)
    grad, = torch.autograd.grad(loss.sum(), maps)
    assert grad.isfinite().all() and loss[1] == 0 and not grad[1].any() and not grad[0, 1:3].any()
    assert abs(loss[0].item() - point_loss(maps[:1, ::3], points[:1, ::3]).item()) < 1e-12  # of the known ones alone
    assert loss[2] == point_loss(maps[2:], points[2:]) and (grad[2].abs().amax((1, 2)) > 0).all()


# ---------------------------------------------------------------- losses by kind

@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_task_loss_of_each_kind(task):
    """Against plain formulas, of bfloat16 too: losses are float32."""
    output = torch.randn({"segmentation": (3, 3, 6, 5), "classification": (3, 4), "detection": (3, 5, 6, 5),
                          "regression": (3, 2, 6, 5)}[task.kind])
    target = {"segmentation": torch.randint(3, (3, 6, 5)), "classification": torch.tensor([3, 0, 1]),
              "detection": random_boxes(3).float(), "regression": torch.rand(3, 2, 2)}[task.kind]
    if task.kind == "segmentation":
        target[0][target[0] == 2] = 0  # an image without the class: its Dice is of the others
        want = []
        for p, mask in zip(output.double().softmax(1).numpy(), target.numpy()):
            dice = [2 * p[k][mask == k].sum() / (p[k].sum() + (mask == k).sum()) for k in range(3) if (mask == k).any()]
            want.append(np.mean([-np.log(p[k, i, j]) for (i, j), k in np.ndenumerate(mask)]) + 1 - np.mean(dice))
        assert len(dice) == 3
    elif task.kind == "classification":
        want = -output.double().log_softmax(1)[torch.arange(3), target]
    else:
        want = (box_loss if task.kind == "detection" else point_loss)(output.double(), target.double())
    loss = task_loss(task, output, target)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    np.testing.assert_allclose(loss, want, rtol=2e-5)
    assert task_loss(task, output.bfloat16(), target).dtype == torch.float32
