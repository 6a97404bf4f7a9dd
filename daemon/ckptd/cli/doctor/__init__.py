"""`ckptd doctor`: what on this node would not work, and how to mend it.

A check is a small pure function from facts to findings; `facts` reads the node, once, and is the
only module here that touches it. A finding says what was found and, where it is not well, what to
do. What cannot be looked at is a finding too, never a silent pass.
"""
