from __future__ import annotations

import copy
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from toy import SPACE, PlainNet, SmallMemory, batchnorm_teacher, toy_images

from raydfkd.config.schema import TermSpec
from raydfkd.data.student_versions import UNPUBLISHED, StudentPublisher, StudentVersions
from raydfkd.errors import RecipeError
from raydfkd.images.pixels import PixelRange
from raydfkd.losses.objective import build_objective
from raydfkd.networks.observed import Need, ObservedNetwork
from raydfkd.store.store import Store
from raydfkd.synthesis.judge import Judge
from raydfkd.synthesis.student_feed import StoredStudentFeed

CPU = torch.device("cpu")


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    """An empty place of each kind."""
    return Store(str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set")


class CountingStore(Store):
    """Notes what it is asked for."""

    def __init__(self, uri):
        super().__init__(uri)
        self.asked = []

    def list(self, prefix):
        self.asked.append("list")
        return super().list(prefix)

    def get(self, path):
        self.asked.append("get")
        return super().get(path)


class ForgetfulStore(Store):
    """Publishes another version just after it was listed, of which only the newest stays."""

    def __init__(self, uri, coming):
        super().__init__(uri)
        self.coming = coming

    def list(self, prefix):
        found = super().list(prefix)
        if self.coming:
            StudentPublisher(Store(self.uri), keep=1).publish(*self.coming.pop(0))
        return found


def state_of(number):
    """Weights that are all ``number``, so that a mixture of two versions would show."""
    return {"weight": torch.full((2, 3), float(number)), "bias": torch.full((5,), float(number))}


def number_of(state):
    (number,) = {float(value) for tensor in state.values() for value in tensor.flatten()}
    return int(number)


def files(store):
    return store.list("students")


def feed_of(store, student=None):
    return StoredStudentFeed(student or batchnorm_teacher(), StudentVersions(store).newest, device=CPU)


def test_published_version_is_one_safetensors_file_that_reads_back_as_it_was(store):
    student = batchnorm_teacher().to(memory_format=torch.channels_last)
    StudentPublisher(store).publish(500, student.state_dict())
    assert files(store) == ["students/000000500.safetensors"]
    version, state = StudentVersions(store).newest()
    assert version == 500
    assert state.keys() == student.state_dict().keys()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(state[name], value.contiguous(), rtol=0, atol=0)


def test_weights_that_share_their_memory_can_be_published(store):
    weight = torch.randn(3, 3)
    StudentPublisher(store).publish(0, {"first": weight, "second": weight.t()})
    _, state = StudentVersions(store).newest()
    assert state["first"].equal(weight)
    assert state["second"].equal(weight.t())


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_versions_stay(store, keep):
    publisher = StudentPublisher(store, keep=keep)
    for version in range(0, 2500, 500):
        publisher.publish(version, state_of(version))
    assert StudentVersions(store).versions() == [0, 500, 1000, 1500, 2000][-keep:]


def test_newest_is_none_unless_there_is_one_newer_than_the_given(store):
    students = StudentVersions(store)
    assert students.newest() is None
    StudentPublisher(store).publish(0, state_of(0))
    assert students.newest()[0] == 0
    assert students.newest(0) is None
    StudentPublisher(store).publish(1000, state_of(1000))
    assert students.newest(0)[0] == 1000
    assert students.newest(1000) is None
    assert students.newest(1001) is None


def test_version_that_a_resumed_training_publishes_again_stays_as_it_was(store):
    StudentPublisher(store).publish(500, state_of(1))
    StudentPublisher(store).publish(500, state_of(2))
    assert number_of(StudentVersions(store).state(500)) == 1


def test_old_step_that_a_resumed_training_makes_again_does_not_replace_newer_versions(store):
    publisher = StudentPublisher(store)
    for version in (1000, 1500, 2000):
        publisher.publish(version, state_of(version))
    StudentPublisher(store).publish(500, state_of(500))
    assert StudentVersions(store).versions() == [1000, 1500, 2000]


def test_version_that_was_removed_since_it_was_listed_is_looked_for_again(tmp_path):
    uri = str(tmp_path / "set")
    StudentPublisher(Store(uri)).publish(0, state_of(0))
    found = StudentVersions(ForgetfulStore(uri, [(version, state_of(version)) for version in (1, 2, 3)])).newest()
    assert found is not None
    assert (found[0], number_of(found[1])) == (3, 3)


def test_version_that_is_listed_and_cannot_be_read_is_an_error_and_no_endless_search(store, monkeypatch):
    monkeypatch.setattr(store, "list", lambda prefix: ["students/000000007.safetensors"])
    with pytest.raises(FileNotFoundError, match=r"students/000000007\.safetensors does not exist"):
        StudentVersions(store).newest()


def test_what_is_no_version_is_not_taken_for_one(store):
    store.put("students/notes.txt", b"")
    store.put("students/12.safetensors", b"")
    assert StudentVersions(store).versions() == []


def test_damaged_version_is_named(store):
    store.put("students/000000005.safetensors", b"not a state dict")
    with pytest.raises(ValueError, match=r"000000005\.safetensors is damaged: 16 bytes that are no state dict"):
        StudentVersions(store).newest()


def test_feeds_see_whole_versions_in_order_while_a_training_publishes_and_removes_them(tmp_path):
    store, last, is_done = Store(str(tmp_path / "set")), 30, threading.Event()

    def publish():
        publisher = StudentPublisher(store, keep=1)
        for version in range(last + 1):
            publisher.publish(version, state_of(version))
        is_done.set()

    def look():
        students, seen = StudentVersions(store), [UNPUBLISHED]
        while True:
            is_last = is_done.is_set()
            found = students.newest(seen[-1])
            if found is not None:
                assert number_of(found[1]) == found[0]
                seen.append(found[0])
            elif is_last:
                return seen

    with ThreadPoolExecutor() as pool:
        looks = [pool.submit(look) for _ in range(3)]
        pool.submit(publish).result()
        for seen in (look.result() for look in looks):
            assert seen == sorted(set(seen))
            assert seen[-1] == last


def test_two_trainings_that_publish_the_same_versions_leave_one_of_each(store):
    start = threading.Barrier(2)

    def publish(offset):
        start.wait()
        for version in range(20):
            StudentPublisher(store, keep=20).publish(version, state_of(1000 * offset + version))

    with ThreadPoolExecutor() as pool:
        list(pool.map(publish, (0, 1)))
    students = StudentVersions(store)
    assert students.versions() == list(range(20))
    assert [number_of(students.state(version)) % 1000 for version in range(20)] == list(range(20))


def test_feed_is_the_fresh_student_until_there_is_a_version(store):
    student, images = batchnorm_teacher(), toy_images(3)
    feed = feed_of(store, student)
    assert (feed.refresh(), feed.version) == (UNPUBLISHED, UNPUBLISHED)
    torch.testing.assert_close(feed(images).logits, student(images))


def test_feed_answers_as_the_newest_version_does_in_eval_mode(store):
    feed, images = feed_of(store), toy_images(3)
    published = batchnorm_teacher(seed=1)
    before = feed(images).logits
    StudentPublisher(store).publish(500, published.train().state_dict())
    torch.testing.assert_close(feed(images).logits, before, rtol=0, atol=0)
    assert feed.refresh() == feed.version == 500
    torch.testing.assert_close(feed(images).logits, published.eval()(images))
    assert not torch.allclose(feed(images).logits, before)


def test_feed_leaves_the_student_that_it_was_given_as_it_was(store):
    student = batchnorm_teacher().train()
    before = copy.deepcopy(student.state_dict())
    StudentPublisher(store).publish(1, batchnorm_teacher(seed=1).state_dict())
    feed = feed_of(store, student)
    feed.refresh()
    feed(toy_images(3))
    assert student.training
    assert all(weight.requires_grad for weight in student.parameters())
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())


def test_feed_passes_gradients_to_the_images_and_keeps_its_weights(store):
    published, images = batchnorm_teacher(seed=1), toy_images(4)
    StudentPublisher(store).publish(500, published.state_dict())
    feed = feed_of(store)
    feed.refresh()
    logits = feed(images).logits
    (found,) = torch.autograd.grad(logits.square().sum(), images)
    (expected,) = torch.autograd.grad(published(images).square().sum(), images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(feed(images).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_later_version_answers_to_the_last_bit_as_if_it_were_the_first(store, precision):
    images, publisher = toy_images(4), StudentPublisher(store)
    feed = StoredStudentFeed(batchnorm_teacher(), StudentVersions(store).newest, device=CPU, precision=precision)
    for version in (1, 2, 3):
        publisher.publish(version, batchnorm_teacher(seed=version).state_dict())
        feed.refresh()
        first = StoredStudentFeed(batchnorm_teacher(), StudentVersions(store).newest, device=CPU, precision=precision)
        first.refresh()
        answers = [asked(images).logits for asked in (feed, first)]
        gradients = [torch.autograd.grad(answer.square().sum(), images)[0] for answer in answers]
        assert answers[0].equal(answers[1])
        assert gradients[0].equal(gradients[1])


def test_student_is_compiled_once_and_not_for_each_version(store, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    feed = StoredStudentFeed(batchnorm_teacher(), StudentVersions(store).newest, device=CPU, compiled=True)
    for version in (1, 2, 3):
        StudentPublisher(store).publish(version, batchnorm_teacher(seed=version).state_dict())
        feed.refresh()
        torch.testing.assert_close(feed(toy_images(3)).logits, batchnorm_teacher(seed=version)(toy_images(3)))
    assert len(compiled) == 1


def test_feed_computes_in_the_precision_of_the_teacher(store):
    published, images = batchnorm_teacher(seed=1), toy_images(4)
    feed = StoredStudentFeed(batchnorm_teacher(), StudentVersions(store).newest, device=CPU, precision=torch.bfloat16)
    StudentPublisher(store).publish(0, published.state_dict())
    feed.refresh()
    expected = ObservedNetwork(published, frozen=True, precision=torch.bfloat16)(images).logits
    torch.testing.assert_close(feed(images).logits, expected, rtol=0, atol=0)
    assert not feed(images).logits.equal(published(images))


def test_images_are_judged_by_the_version_that_is_recorded_beside_them(store):
    published, images = batchnorm_teacher(seed=1), toy_images(4)
    feed, specs = feed_of(store), [TermSpec.model_validate("logit_gap")]
    judge = Judge(
        teacher=ObservedNetwork(batchnorm_teacher(), frozen=True),
        objective=build_objective(specs, has_targets=False, offers={Need.STUDENT}),
        pixels=PixelRange(SPACE),
        student=feed,
    )
    StudentPublisher(store).publish(500, published.state_dict())
    feed.refresh()
    _, value = judge(images, None)
    seen = PixelRange(SPACE).from_nominal(images)
    torch.testing.assert_close(value.total, -(published(seen) - batchnorm_teacher()(seen)).abs().mean())
    assert judge.keep(images.detach(), None, 0.0).student_version == 500


def test_look_that_finds_nothing_new_is_one_listing(tmp_path):
    store = CountingStore(str(tmp_path / "set"))
    StudentPublisher(store).publish(3, batchnorm_teacher().state_dict())
    feed = feed_of(store)
    feed.refresh()
    store.asked.clear()
    assert feed.refresh() == 3
    assert store.asked == ["list"]


def test_pinned_feed_stays_with_its_version_whatever_is_published(tmp_path):
    store = CountingStore(str(tmp_path / "set"))
    publisher, images = StudentPublisher(store), toy_images(3)
    for version in (1, 2, 3):
        publisher.publish(version, batchnorm_teacher(seed=version).state_dict())
    students = StudentVersions(store)
    feed = StoredStudentFeed(batchnorm_teacher(), students.pinned(2), device=CPU)
    assert feed.refresh() == 2
    torch.testing.assert_close(feed(images).logits, batchnorm_teacher(seed=2)(images))
    store.asked.clear()
    assert feed.refresh() == 2
    assert store.asked == []
    feed.follow(students.pinned(1))
    assert feed.refresh() == 1, "an older one as well"
    torch.testing.assert_close(feed(images).logits, batchnorm_teacher(seed=1)(images))


def test_pinned_version_that_is_not_there_is_named(store):
    feed = StoredStudentFeed(batchnorm_teacher(), StudentVersions(store).pinned(2), device=CPU)
    with pytest.raises(FileNotFoundError, match=r"students/000000002\.safetensors does not exist"):
        feed.refresh()


@pytest.mark.parametrize("other", [PlainNet(), SmallMemory(9, RuntimeError())], ids=["other layers", "other widths"])
def test_version_of_another_network_is_refused_in_one_line_and_not_used(store, other):
    feed, images = feed_of(store), toy_images(3)
    before = feed(images).logits
    StudentPublisher(store).publish(7, other.state_dict())
    with pytest.raises(RecipeError, match=r"version 7 of the student \(body.*\); restore it or give another") as error:
        feed.refresh()
    assert "\n" not in str(error.value)
    assert feed.version == UNPUBLISHED
    torch.testing.assert_close(feed(images).logits, before, rtol=0, atol=0)
