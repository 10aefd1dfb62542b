from transfgu_ray.terminal import printable


def test_printable__a_name_stays_on_its_line_and_does_nothing_to_the_terminal():
    assert printable("a\nb\x1b[2J\u202e.jpg") == r"a\nb\x1b[2J\u202e.jpg"
    assert printable("été à la plage 日本.jpg") == "été à la plage 日本.jpg"
