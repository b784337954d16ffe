"""Scores of many tasks, of validation, test and blind guesses: against loops over images, points and pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from multi_cases import CPU, SIDE, STATS, TASKS, arguments, built, small_data
from scipy.spatial.distance import directed_hausdorff
from sklearn.metrics import f1_score
from stage_tools import one_thread  # noqa: F401

from labelled import task_sets
from networks.heads import boxes_of, points_of
from scores import metrics, multi_report
from training import many_tasks


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_primary_score_is_the_reports(task):
    rng, m = np.random.default_rng(0), 23
    missing = rng.random((m, 2)) < 0.3
    missing[0] = True
    values = {"segmentation": {"Dice": np.where(missing, np.nan, rng.random((m, 2)))},
              "classification": {"probabilities": rng.dirichlet(np.ones(3), m)},
              "detection": {"IoU": rng.random(m)},
              "regression": {"error": np.where(missing, np.nan, rng.random((m, 2)))}}
    labels, own = rng.integers(0, 3, m), values[task.kind]
    truth = multi_report.Truth(task.kind, task.K, np.arange(m), labels, np.full(m, 9.0), own)
    want = multi_report.replicates_of(truth, [own], np.arange(m), np.ones((1, m)))[0]
    assert abs(many_tasks.primary_score(task, own, labels) - want) < 1e-6


def test_canvas_dice_image_by_image():
    truth, found = (torch.randint(4, (6, 5, 7), dtype=dtype) for dtype in (torch.uint8, torch.int64))
    truth[truth == 2], truth[1] = 3, 0
    got = many_tasks.canvas_dice(truth, found, 5)
    want = np.array([metrics.dice(metrics.mask_counts(*pair, 5)[1:]) for pair in zip(truth.numpy(), found.numpy())])
    want[[[not (own == k).any() for k in range(1, 5)] for own in truth]] = np.nan
    np.testing.assert_array_equal(got, want)
    assert np.isnan(got[1]).all() and np.isnan(got[:, [1, 3]]).all() and np.nanmin(got) > 0


def iou_by_hand(a, b):
    wide, high = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    return wide * high / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - wide * high)


def mask_dice(truth, found):
    """{class: Dice} of the foreground classes that the truth has."""
    return {k: 2 * ((truth == k) & (found == k)).sum() / ((truth == k).sum() + (found == k).sum())
            for k in range(1, 3) if (truth == k).any()}


def score_by_hand(task, own, data, rows, say):
    """Primary score of say(row), one image at a time: a mask as squashed, probabilities, a box or points as shares."""
    if task.kind == "segmentation":
        dices = [mask_dice(own.target[row], say(row)) for row in rows]
        return np.mean([np.mean([dice[k] for dice in dices if k in dice]) for k in (1, 2)])
    if task.kind == "classification":
        return f1_score(own.truth[rows], [say(row).argmax() for row in rows], average="macro")
    each = []
    for row in rows:
        (width, height), found = data.sizes[own.images[row]], np.asarray(say(row), np.float64)
        if task.kind == "detection":
            each.append(iou_by_hand(own.truth[row], found * [width, height, width, height]))
        else:
            apart = np.hypot(*(found * [width, height] - own.truth[row]).T)
            each.append(np.mean([distance for distance in apart if distance == distance]))
    return np.mean(each)


def mean_mask_by_hand(masks):
    """Where it is 1 or more: how often a class is there, over the share at which the mean Dice is best, of 20."""
    often, best = np.sum(masks, axis=0) / len(masks), (-1, None)
    for level in range(1, 21):
        share = often.max() * level / 20
        guess = often >= share
        score = np.mean([2 * (mask & guess).sum() / (mask.sum() + guess.sum()) for mask in masks if mask.any()])
        best = max(best, (score, -share))  # of equal scores the smallest share
    return often / -best[1]


def guess_by_hand(task, target):
    if task.kind == "segmentation":
        above = {k: mean_mask_by_hand([mask == k for mask in target]) for k in (1, 2)}
        return [[max((0, 1, 2), key=lambda k: 1 - 1e-12 if k == 0 else above[k][i, j]) for j in range(SIDE)]
                for i in range(SIDE)]
    if task.kind == "classification":
        return [list(target).count(k) / len(target) for k in range(3)]
    if task.kind == "detection":
        return [sum(box[k] for box in target) / len(target) for k in range(4)]
    known = [[[p[k, axis] for p in target if p[k, axis] == p[k, axis]] for axis in range(2)] for k in range(2)]
    return [[sum(values) / len(values) for values in of_point] for of_point in known]


@pytest.mark.parametrize("number", range(4), ids=[task.kind for task in TASKS])
def test_a_blind_guess_by_hand(number):
    data, _ = small_data()
    task, own = TASKS[number], data.per[number]
    guess = np.array(guess_by_hand(task, own.target[own.train]))
    np.testing.assert_allclose(task_sets.blind_guess(task, own), guess, atol=1e-12)
    want = score_by_hand(task, own, data, own.val, lambda row: guess)
    assert abs(many_tasks.guessed_score(task, own, data) - want) < 1e-9
    values = many_tasks.guess_values(task, own, data, own.test, True)
    assert {len(value) for value in values.values()} == {len(own.test)}
    if task.kind == "segmentation":
        shown = task_sets.guessed_mask(guess.astype(np.uint8), 3 * SIDE, 2 * SIDE)
        assert np.array_equal(shown, guess.repeat(3, axis=0).repeat(2, axis=1))
        for row, dice in zip(own.test, values["Dice"]):
            shown = task_sets.guessed_mask(guess.astype(np.uint8), *own.truth[row].shape)
            known = mask_dice(own.truth[row], shown)
            np.testing.assert_allclose(dice, [known.get(k, np.nan) for k in (1, 2)], atol=1e-12)


@pytest.mark.parametrize("how", [dict(), dict(experts=1)], ids=["experts", "dense"])
def test_validation_and_test_image_by_image(how):
    """Of three of the tasks, in another order than the data's: `numbers` say which."""
    data, canvases = small_data()
    for numbers in ([3, 0, 2], [1]):
        network, _, _ = built(tasks=[TASKS[number] for number in numbers], **how)
        guesses = {number: many_tasks.guessed_score(TASKS[number], data.per[number], data) for number in numbers}
        how_to = (STATS, arguments(), CPU, 0, 1)
        scores, mean, gates = many_tasks.validate(network, numbers, data, canvases, guesses, *how_to)
        assert network.training and list(scores) == [TASKS[number].name for number in numbers]
        network.eval()
        normalised = []
        for position, number in enumerate(numbers):
            task, own, shown = TASKS[number], data.per[number], {}

            def look(row):
                x = torch.from_numpy((canvases[own.images[row]] / 255 - 0.4) / 0.25).float()[None, None]
                with torch.no_grad():
                    output, shares = network(x, position)
                shown[row] = torch.stack([p.mean(0) for p in shares]) if shares else None
                return output

            def say(row):
                output = look(row)
                if task.kind == "segmentation":
                    return output[0].argmax(0).numpy()
                return (output.softmax(1) if task.kind == "classification" else
                        boxes_of(output)[0] if task.kind == "detection" else points_of(output)[0])[0].numpy()

            want = score_by_hand(task, own, data, own.val, say)
            assert abs(scores[task.name] - want) < 1e-4 * max(1, want)
            g = guesses[number]
            normalised.append(max(-1, 1 - want / g if task.kind == "regression" else (want - g) / (1 - g)))
            if how:
                assert gates == {}
            else:
                want = np.mean([shown[row].numpy() for row in own.val], 0)
                np.testing.assert_allclose(gates[task.name], want, atol=1e-5)
            values, shares = many_tasks.test_values(network, position, task, own, data, canvases, *how_to)
            check_test_values(task, own, data, values, look, say)
            assert (shares is None) == bool(how)
        assert abs(mean - np.mean(normalised)) < 1e-4


def check_test_values(task, own, data, values, look, say):
    for place, row in enumerate(own.test):
        width, height = data.sizes[own.images[row]]
        if task.kind == "classification":
            np.testing.assert_allclose(values["probabilities"][place], say(row), atol=1e-5)
        elif task.kind == "detection":
            found = say(row).astype(np.float64) * [width, height, width, height]
            assert abs(values["IoU"][place] - iou_by_hand(own.truth[row], found)) < 1e-4
        elif task.kind == "regression":
            apart = [say(row) * [width, height] - points for points in (own.truth[row], np.nan_to_num(own.truth[row]))]
            for name, own_apart in zip(("error", "challenge error"), apart):
                np.testing.assert_allclose(values[name][place], np.hypot(*own_apart.T), atol=1e-3)
        else:
            truth = own.truth[row]
            mask = F.interpolate(look(row), truth.shape, mode="bilinear").argmax(1)[0].numpy()
            dice, hd95 = (metrics.mask_scores(truth, mask, 3, None, 0)[1][name][1:] for name in ("Dice", "HD95"))
            np.testing.assert_allclose([values["Dice"][place], values["HD95"][place]], [dice, hd95], atol=1e-12)
            for k in (1, 2):
                a, b = np.argwhere(truth == k), np.argwhere(mask == k)
                hd = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]) if len(a) and len(b) else (
                    np.hypot(width, height) if len(a) or len(b) else 0)
                dsc = 2 * ((truth == k) & (mask == k)).sum() / (len(a) + len(b)) if len(a) or len(b) else 1
                np.testing.assert_allclose([values["DSC"][place, k - 1], values["HD"][place, k - 1]], [dsc, hd])


@pytest.mark.parametrize("world_size", [3, 20])
def test_processes_share_the_rows(world_size, monkeypatch):
    """What the processes give to be summed makes together what one process has; of 20 some have nothing to do."""
    data, canvases = small_data()
    network, sums = built()[0].eval(), {}
    for number, task in enumerate(TASKS):
        for size in (1, world_size):
            gathered = []
            for rank in range(size):
                given = []
                monkeypatch.setattr(many_tasks, "all_reduce", lambda x: given.append(x.double().clone()) or x)
                many_tasks.test_values(network, number, task, data.per[number], data, canvases, STATS, arguments(),
                                        CPU, rank, size)
                gathered.append(given)
            sums[size] = [sum(parts) for parts in zip(*gathered, strict=True)]
        assert len(sums[1]) == (5 if task.kind == "segmentation" else 2)
        for whole, parts in zip(sums[1], sums[world_size], strict=True):
            np.testing.assert_allclose(whole, parts, atol=1e-5)
