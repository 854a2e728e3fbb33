"""Plots of friends, children and talking animals: turns, a new child, a race, the way home."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import ANIMAL_OPENING, FAIR_DAYS, HOMES, OPENING, cast

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

RACERS = table(
    """
    animal / trait / den / rival / goal
    hare, fox, deer / quick, fast, proud / in the forest, near the hills \
    / turtle, snail, hedgehog / oak, rock, stream, bridge
    pony, horse, goat / quick, strong, proud / on a farm, on a green hill \
    / duck, hen, pig / barn, gate, pond, road
    ostrich, zebra, lion / quick, strong, proud / in a hot land, on a wide plain \
    / turtle, snail, hippo / lake, palm, river
    """
)

STUMBLES = table(
    """
    stumble
    stepped into a hole, fell over a stone, slipped and fell
    """
)

RACE = Plot(
    (cast("Pip", "Dot"), RACERS, STUMBLES),
    ANIMAL_OPENING
    + script(
        """
        - {He} could run faster than all the other animals.
        - "Nobody is as fast as I am!" {he} always said.

        - One day, {he} laughed at {friend} the {rival}. "You are so slow!"
        - "You are so slow!" {he} told {friend} the {rival}.

        - "Let us have a race to the {goal}," said {friend}.
        - "Will you race me to the {goal}?" asked {friend}.

        - "Go!" {hero} ran like the wind, and {friend} went step by step.
        - "Go!" cried the animals. {hero} ran ahead, and {friend} came slowly behind.

        - But {hero} did not look at the path. {He} {stumble}. "Ouch!" {he} cried.
        - Then {hero} looked back to laugh. {He} {stumble} and began to cry.

        - Soon {friend} came by and stopped.
        - {friend} saw the {goal}, but {friend_he} did not go on.

        - "Do not cry," said {friend}. "We will go on together."
        - "You are more important than a race," said {friend}.

        - Side by side, they reached the {goal}.
        - They came to the {goal} together, and everyone clapped.

        - "I am sorry that I laughed at you," said {hero}.
        - {hero} learned that it is better to be kind than to be fast.
        - After that, {hero} never made fun of {friend} again.
        """
    ),
)

YOUNG = table(
    """
    animal / trait / den / home / lure / far
    duckling / little, yellow, fluffy / on a blue pond / pond \
    / a dragonfly, a shiny fish / into the tall reeds
    fox / little, red, curious / in a den under a hill / den \
    / a butterfly, a falling leaf / deep into the woods
    bear / little, brown, hungry / in a warm cave / cave \
    / a busy bee, a sweet smell / over the hills
    rabbit / little, white, curious / in a hole near the woods / hole \
    / a butterfly, a grasshopper / across the wide field
    mouse / tiny, gray, curious / in a barn / barn \
    / a beetle, a rolling nut / across the wide field
    """
)

GUIDES = table(
    """
    guide
    owl, deer, crow, hedgehog, mole
    """
)

LOST_WAY = Plot(
    (cast("Hazel", "Rusty"), YOUNG, GUIDES),
    ANIMAL_OPENING
    + script(
        """
        - "Stay close to the {home}," {his} mother always said.
        - Every day, {he} played near the {home} with {his} mother.

        - One day, {hero} saw {lure}. {He} wanted to catch it.
        - One day, {lure} went by. "Wait for me!" called {hero}.

        - {He} followed it {far}. Then {he} did not know where {he} was.
        - {He} ran after it {far}. Then everything looked strange.

        - "I want my mother," {he} cried.
        - "Oh no, I am lost!" said {hero} and began to cry.

        - {A guide} heard {him}. "Why are you crying?" the {guide} asked.
        - Just then, {a guide} came by and asked, "What is the matter?"

        - "I know where you live," said the {guide}. "Follow me."
        - "Do not cry," said the {guide}. "I will take you home."

        - At last, {hero} was home again and ran to {his} mother.
        - Then {hero} heard a voice. It was {his} mother!

        - {His} mother thanked the {guide} and gave {hero} a kiss.
        - {hero} thanked the {guide} and ate a big dinner.

        - That night, {hero} slept close to {his} mother.
        - From then on, {hero} never went so far alone.
        - {hero} learned to stay close to home.
        """
    ),
)

FEARS = table(
    """
    animal / trait / den / act / risk / worry / start / did / joy
    bird / little, blue, tiny / in a nest / fly / fall / The ground is so far away \
    / spread {his} wings / flew up into the sky / The wind carries me
    duckling / little, yellow, fluffy / by a pond / swim / sink / The water is so deep \
    / put one foot into the water / swam across the pond / The water holds me
    squirrel / little, red, small / in a hollow tree / jump / fall / The branch is so far away \
    / bent {his} legs / jumped from branch to branch / It feels like flying
    frog / little, green, tiny / beside a pond / dive / sink / The water is so dark \
    / closed {his} eyes / dived into the pond / I can see all the fish
    kitten / little, gray, fluffy / in a barn / climb / fall / The tree is so tall \
    / put both paws on the tree / climbed to the first branch / I can see the whole farm
    kangaroo / little, brown, small / on a dry plain / hop / trip / My feet are so big \
    / bent {his} knees / hopped over the bushes / I am bouncing like a ball
    goat / little, white, small / on a high hill / leap / slip / The rocks are so steep \
    / bent {his} legs / leaped from rock to rock / I can see the whole valley
    """
)

AFRAID = Plot(
    (cast("Chip", "Penny"), FEARS),
    ANIMAL_OPENING
    + script(
        """
        - All {his} brothers and sisters could {act}, but {hero} was afraid.
        - {hero} was old enough to {act}, but {he} was afraid.

        - "What if I {risk}?" {he} said. "{worry}!"
        - "I can not {act}," {he} said. "{worry}! I will {risk}."

        - One day, {his} friend {friend} came and sat down next to {him}.
        - One day, {his} friend {friend} saw how sad {he} was.

        - "I was afraid too," said {friend}. "But I tried, and now I love to {act}."
        - "I will stay right beside you," said {friend}. "We can {act} together."

        - {hero} {start}. {His} heart beat very fast.
        - Slowly, {hero} {start} and took a deep breath.

        - Then {he} did it. {He} {did}!
        - And then, just like that, {he} {did}!

        - "Look, {friend}! I can {act}!" {he} shouted. "{joy}!"
        - "{joy}!" called {hero}. "It is wonderful!"

        - From that day on, {hero} loved to {act} more than anything.
        - {hero} learned that you can be afraid and brave at the same time.
        - That night, {hero} was tired and very happy.
        """
    ),
)

STORES = table(
    """
    animal / trait / den / guest
    squirrel / busy, red, careful / in a hollow tree / bird, mouse, rabbit
    mouse / busy, tiny, careful / under an old barn / sparrow, rat, squirrel
    chipmunk / busy, striped, careful / under a big rock / bird, mouse, squirrel
    hamster / busy, golden, careful / at the edge of a field / sparrow, mouse, rabbit
    beaver / busy, strong, careful / beside a stream / rabbit, deer, mouse
    """
)

FOOD = table(
    """
    food
    nuts, seeds, acorns, roots
    """
)

WINTER = Plot(
    (cast("Bella", "Otto"), STORES, FOOD),
    ANIMAL_OPENING
    + script(
        """
        - All through the autumn, {he} filled {his} home with {food}.
        - When the leaves fell, {he} worked all day and stored {food}.

        - {His} friend {friend} the {guest} only sang and played.
        - {His} friend {friend} the {guest} danced in the leaves and did not work.

        - "Winter will be cold and long," said {hero}. "You should get ready."
        - "Soon there will be snow," said {hero}. "Then there is nothing to eat."

        - But {friend} only laughed and went to play.
        - "I will do it tomorrow," said {friend}, but {friend_he} never did.

        - Then the snow came, and everything was white.
        - One morning, the whole land was under deep snow.

        - There was a knock at the door. It was {friend}, cold and hungry.
        - Then {he} heard a weak voice. It was {friend}, cold and hungry.

        - "You were right," said {friend}. "I have no food."
        - "I have no food," said {friend}. "I should have listened to you."

        - "Come in," said {hero}. "There is enough for two."
        - "Come in and eat," said {hero}. "You are my friend."

        - All winter long, {hero} and {friend} kept each other warm.
        - {hero} and {friend} shared the food and told stories until the spring.
        - The next autumn, they worked side by side.
        - {hero} was happy. A full home is nice, but a shared one is nicer.
        """
    ),
)

ANIMALS = (RACE, LOST_WAY, AFRAID, WINTER)
