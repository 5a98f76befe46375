"""What waits on an edge, and who gets it."""

from nodes.depot import CHECKPOINT, Depot, Waiting

FOR_EVER = float("inf")
WALKER, STRANGER = Waiting(b"1", "device/phone", 1, asked=0.0), Waiting(b"2", "device/other", 1, asked=0.0)


def test_who_asks_early_gets_it_when_it_is_there_if_it_is_for_them():
    depot = Depot()
    for waiting in (WALKER, STRANGER):
        depot.wait("job", 1, waiting)
    depot.put("job", 1, b"latent")
    assert depot.due("job", 1) == []  # the gateway has said nothing yet
    depot.allow("job", 1, WALKER.key)
    assert depot.due("job", 1) == [WALKER]
    assert depot.due("job", 1) == []
    assert depot.in_vain(FOR_EVER) == []
    assert depot.in_vain(0.0) == [("job", 1, STRANGER)]
    assert depot.in_vain(0.0) == []


def test_another_leg_is_not_theirs():
    depot = Depot()
    depot.put("job", 1, b"latent")
    depot.allow("job", 2, WALKER.key)
    depot.wait("job", 1, WALKER)
    assert depot.due("job", 1) == []


def test_what_went_for_want_of_room_is_not_waited_for():
    depot = Depot(limit_bytes=10)
    depot.allow("old", 1, WALKER.key)
    depot.put("old", 1, bytes(8))
    depot.put("new", 1, bytes(8))
    assert (len(depot), depot.bytes) == (1, 8)
    depot.wait("old", 1, WALKER)
    assert depot.due("old", 1) == []
    assert depot.in_vain(FOR_EVER) == [("old", 1, WALKER)]


def test_a_job_that_is_released_leaves_nothing():
    depot = Depot()
    depot.allow("job", 1, WALKER.key)
    depot.put("job", 1, b"latent")
    depot.wait("job", 2, WALKER)
    depot.release("job")
    depot.wait("job", 1, WALKER)
    assert (len(depot), depot.bytes, depot.due("job", 1)) == (0, 0, [])
    assert depot.in_vain(0.0) == [("job", 1, WALKER)]


def test_checkpoints_are_kept_for_those_the_gateway_named_the_farthest_of_each_job():
    depot = Depot(checkpoint_bytes=20)
    assert not depot.keep(WALKER.key, "job", 0, 2, b"two")
    depot.allow("job", CHECKPOINT, WALKER.key)
    assert not depot.keep(STRANGER.key, "job", 0, 2, b"two")
    assert depot.keep(WALKER.key, "job", 0, 2, b"two")
    assert depot.keep(WALKER.key, "job", 0, 4, b"four")
    assert not depot.keep(WALKER.key, "job", 0, 3, b"three")
    assert not depot.keep(WALKER.key, "job", 1, 1, bytes(21))  # no room
    depot.wait("job", CHECKPOINT, WALKER)
    assert (depot.due("job", CHECKPOINT), depot.get("job", CHECKPOINT)) == ([WALKER], b"four")
    depot.allow("other", CHECKPOINT, WALKER.key)
    assert depot.keep(WALKER.key, "other", 0, 1, bytes(18))  # the older job's goes
    depot.wait("job", CHECKPOINT, WALKER)
    assert depot.due("job", CHECKPOINT) == []
    assert depot.in_vain(FOR_EVER) == [("job", CHECKPOINT, WALKER)]
    depot.release("other")
    assert depot.get("other", CHECKPOINT) is None
    assert not depot.keep(WALKER.key, "other", 0, 2, b"late")  # it was under way when its job ended
