"""Work that may never end: networks, and libraries that use them."""

import threading


def within(seconds, work):
    """What work() returns or raises, on another thread, which is left behind where it takes longer: TimeoutError."""
    answers = []

    def answer():
        try:
            answers.append((work(), None))
        except Exception as e:
            answers.append((None, e))
        except BaseException as e:                                      # SystemExit of a thread would go unseen
            answers.append((None, RuntimeError(type(e).__name__)))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f'no answer in {seconds:g} seconds')
    result, error = answers[0]
    if error is not None:
        raise error
    return result
