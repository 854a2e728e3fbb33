"""Stories in which animals talk: a race, the way home, a first try, a winter store."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import ANIMAL_OPENING, cast

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
