#!/bin/bash
# Say by a file how well the agent did: 1 or 0.
if [[ $(cat /srv/answer.txt) == 42 ]]; then reward=1; else reward=0; fi
echo "$reward" > /logs/verifier/reward.txt
