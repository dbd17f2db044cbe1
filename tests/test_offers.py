"""What a sentence offers: who gets how many of each kind of item."""

import pytest

from mbrl_lm.envs import offers

COUNT = (1, 3, 2)  # the book, three hats, two balls


@pytest.mark.parametrize(
    "text, share",
    [
        ("i want the book and 2 hats", (1, 2, 0)),
        ("i'd like the hats , you can have the rest", (0, 3, 0)),
        ("you can have the book and both balls", (0, 3, 0)),
        ("you get the book and i get everything else", (0, 3, 2)),
        ("i need the balls . you can take all the hats", (0, 0, 2)),
        ("balls to you , i take rest", (1, 3, 0)),
        ("book for me , 2 hats for you", (1, 1, 0)),
        ("1 ball for you , rest for myself", (1, 3, 1)),
        ("how about i give you a hat and one ball", (1, 2, 1)),
        ("give me the book and you keep the others", (1, 0, 0)),
        ("i only need the ball . . . the rest are yours", (0, 0, 1)),
        ("i would like one of each", (1, 1, 1)),
        ("you can have everything except the book", (1, 0, 0)),
        ("i will take everything", (1, 3, 2)),
        ("can i have three hats ?", (0, 3, 0)),
        ("i want 5 hats", (0, 3, 0)),  # no more than there are
        ("i do not need the book , i want 2 balls", (0, 0, 2)),
        ("i can't give you the book", None),
        ("deal", None),
        ("what would you like ?", None),
        ("", None),
    ],
)
def test_by_hand(text, share):
    assert offers.read(text, COUNT) == share


def test_what_is_not_spoken_of_stays_as_it_was_offered():
    assert offers.read("i take 1 hat and you take 2 hats", COUNT) == (0, 1, 0)
    assert offers.read("i take 1 hat and you take 2 hats", COUNT, before=(1, 0, 2)) == (1, 1, 2)


def test_agreement():
    assert all(map(offers.accepts, ("deal", "ok , sounds good !", "that works for me")))
    assert not any(map(offers.accepts, ("no deal", "that won't do", "i can't agree to that", "hello", "")))


def test_what_is_left():
    assert offers.mirrored((1, 0, 2), COUNT) == (0, 3, 0)
