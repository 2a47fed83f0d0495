"""A turn fed bit by bit, and the check that it says what `parse` says of the whole."""

import itertools

from jaxdeep.chat.format import CallBegin, CallEnd, CallText, ContentText, ReasoningText


def chunks(tokens, rng, largest):
    """The tokens in runs of 0 to `largest`."""
    at = 0
    while at < len(tokens):
        size = rng.randint(0, largest)
        yield tokens[at : at + size]
        at += size


def stream(chat, runs):
    """The events of a turn, and its message."""
    parser = chat.parser()
    events = [event for run in runs for event in parser.feed(run)]
    events += parser.flush()
    return events, parser.finish()


def joined(events, kind):
    return "".join(event.text for event in events if isinstance(event, kind))


def check(chat, tokens, runs):
    """The events agree with `parse`, and calls begin, go on and end in order."""
    want = chat.parse(tokens)
    events, message = stream(chat, runs)
    assert message == want
    assert joined(events, ContentText) == want.content
    assert joined(events, ReasoningText) == want.reasoning
    of_calls = [e for e in events if not isinstance(e, (ContentText, ReasoningText))]
    for index, run in itertools.groupby(of_calls, key=lambda event: event.index):
        begin, *texts, end = run
        assert begin == CallBegin(index) and end == CallEnd(index, want.calls[index])
        assert all(isinstance(event, CallText) for event in texts)
    assert [e.index for e in of_calls if isinstance(e, CallEnd)] == list(range(len(want.calls)))
    assert all(event.text for event in events if not isinstance(event, (CallBegin, CallEnd)))
    return events
