"""Messages."""

from esc_basicsr.common.errors import UserError


def test_a_message_holds_nothing_that_steers_a_terminal():
    told = str(UserError("a\x1b[2Jb\u202ec\udcffd\r\n  é 名"))
    assert told == "a\\x1b[2Jb\\u202ec\\udcffd\\r\n  é 名"
