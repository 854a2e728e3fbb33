"""Stories about friends: taking turns, a new child at school, learning something hard."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import FAIR_DAYS, HOMES, OPENING, cast

RIDES = table(
    """
    ride / look / play
    scooter / fast, blue, red / ride the scooter, race down the path on the scooter
    wagon / green, wooden, big / pull the wagon, ride in the wagon
    swing / new, high, yellow / sit on the swing, fly high on the swing
    drum / loud, red, round / play the drum, beat the drum
    jump rope / long, pink, new / jump with the jump rope, play with the jump rope
    paint box / big, new, pretty / paint with the paint box, use the paint box
    trampoline / big, new, round / jump on the trampoline, bounce on the trampoline
    sled / fast, wooden, red / ride down the hill on the sled, slide on the sled
    """
)

TURNS = Plot(
    (cast("Clara", "Eli", "Mom"), HOMES, RIDES),
    OPENING
    + script(
        """
        - {He} had {a look} {ride}.
        - {hero} was very proud of {his} {look} {ride}.
        - For {his} birthday, {he} got {a look} {ride}.

        - One day, {his} friend {friend} saw the {ride}. "May I {play}?" {friend_he} asked.
        - One day, {friend} came. "What {a ride}! Can I {play} too?" {friend_he} asked.

        - "No! It is my {ride}!" said {hero}.
        - {hero} shook {his} head. "Only I can use it," {he} said.

        - They both pulled at the {ride}, and {hero} fell down.
        - They yelled at each other, and nobody had any fun.

        - {elder} heard the noise and came out. "What is wrong?" asked {elder}.
        - Then {elder} came. "Stop, please," said {elder}.

        - "You can take turns. Count to fifty, and then change."
        - "If you take turns, you will both have fun."

        - {hero} thought about it. "You can go first, {friend}," {he} said.
        - "I am sorry, {friend}," said {hero}. "It is your turn now."

        - So {friend} had a turn, and then {hero} had a turn.
        - {friend} was so happy. "Now it is your turn again!" {friend_he} called.

        - {hero} saw that the {ride} was more fun with a friend.
        - {hero} learned that taking turns is fair and fun.
        - "Will you come again tomorrow?" asked {hero}. "Yes!" said {friend}.
        """
    ),
)

ACTIVITIES = table(
    """
    doing / offer / made
    building a tower of blocks / hold the blocks / built the tallest tower of all
    drawing with chalk / draw a sun / drew a whole garden on the ground
    digging in the sand / dig a tunnel / made a castle with a long tunnel
    playing with a ball / kick the ball / kicked the ball back and forth
    making a chain of flowers / find more flowers / made a chain with a hundred flowers
    looking at a book / read with me / read about pirates and dragons
    doing a puzzle / find the last pieces / finished the whole puzzle
    """
)

NEW_FRIEND = Plot(
    (cast("Oscar", "Maya"), HOMES, ACTIVITIES),
    OPENING
    + script(
        """
        - One day, there was a new child at school. It was {friend}.
        - One Monday, a new child named {friend} came to school.

        - {friend} was shy and stood all alone at lunch.
        - {friend} did not know anybody and sat alone on the steps.

        - {hero} was {doing} when {he} saw {friend_him}.
        - {hero} was {doing} and saw how sad {friend} looked.

        - {He} came over and said, "I am {hero}. Do you want to play?"
        - {He} smiled and waved. "My name is {hero}. Will you play with me?"

        - "I do not know how," said {friend} softly.
        - "May I really?" asked {friend} in a quiet voice.

        - "It is easy. You can {offer}," said {hero}.
        - "Of course! You can {offer}," said {hero} and took {friend_his} hand.

        - So they played together and {made}.
        - Soon they forgot the time. They {made}.

        - {friend} laughed for the first time that day.
        - Now {friend} was not shy any more.

        - From that day on, {hero} and {friend} were best friends.
        - {hero} learned that a kind word can make a friend.
        - "See you tomorrow!" called {hero}, and {friend} waved.
        """
    ),
)

SKILLS = table(
    """
    skill / fall / done
    ride a bike / fell into the grass / rode all the way to the corner
    swim / swallowed some water and coughed / swam across the whole pool
    tie a bow / made a knot that would not open / tied two neat bows
    whistle / made only a puff of air / whistled a whole song
    catch a ball / dropped the ball on one toe / caught the ball with both hands
    play the piano / hit all the wrong keys / played a song from start to end
    skate / slipped and sat down hard / skated in a big circle
    row a boat / went around in circles / rowed across the whole lake
    """
)

LEARN = Plot(
    (cast("Ida", "Hugo"), HOMES, SKILLS, FAIR_DAYS),
    OPENING
    + script(
        """
        - More than anything, {hero} wanted to {skill}.
        - {He} had one big wish. It was to {skill}.

        - {His} friend {friend} could do that very well.
        - One {day}, {he} saw {his} friend {friend} do that. It looked so easy!

        - {hero} tried to {skill}, but {he} {fall}.
        - When {hero} tried to {skill}, {he} {fall}.

        - "I can not do it!" {he} cried.
        - "It is too hard!" said {hero} and stamped {his} foot.

        - "I could not do it at first," said {friend}. "You need to practice."
        - "Do not give up," said {friend}. "Go slow and try again."

        - So {hero} practiced every day after school.
        - {hero} dried {his} tears and practiced for a whole week.

        - Then, one morning, {hero} could {skill}. {He} {done}!
        - At last, {he} could {skill}! {hero} {done}.

        - "Look at me! I can {skill}!" {he} shouted.
        - "You did it!" called {friend} and clapped.

        - {hero} was so proud that {he} smiled all day.
        - {hero} felt as tall as a tree.
        - {He} learned that you get better when you keep trying.
        - "Thank you for your help, {friend}," said {hero}.
        """
    ),
)

FRIENDS = (TURNS, NEW_FRIEND, LEARN)
