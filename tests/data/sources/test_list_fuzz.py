"""Readers of lists take whatever text comes: a result, or one line that names the file."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollingq_jax.data.sources import crema_d, kinetics_sounds
from rollingq_jax.errors import DataError

WORDS = st.sampled_from(
    ["1001_DFA_ANG_XX", "ANG", "JOY", "name", "label", "FileName", "VoiceVote", "VoiceLevel",
     "FaceVote", "FaceLevel", "A:H", "50:60", "-3Mwkq-7TV4_2", "10", "31", "-1", "../x", "\x00",
     '"', "\ufeff", "", " "]
)  # fmt: skip
LINES = st.lists(st.lists(WORDS, max_size=6).map(",".join), max_size=5).map("\n".join)
CONTENT = st.one_of(LINES.map(str.encode), st.text(max_size=80).map(str.encode), st.binary())
READERS = {
    "split list": crema_d.read_split_list,
    "ratings": crema_d.read_ratings,
    "Kinetics list": kinetics_sounds.read_list,
    "class names": kinetics_sounds.read_class_names,
}


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=CONTENT)
def test_any_content_gives_a_result_or_one_line(name, content, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    try:
        READERS[name](path)
    except DataError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
