"""Stories of play and small bad luck: a lost toy, a kite in a tree, rain on a picnic."""

from llama_jax.stories.grammar import Plot, script, table
from llama_jax.stories.words import FAIR_DAYS, HOMES, OPENING, cast

TOYS = table(
    """
    toy / look
    ball / red, blue, green, bouncy
    teddy bear / soft, brown, fluffy
    doll / small, pretty, soft
    toy car / red, blue, shiny, tiny
    toy train / green, shiny, wooden
    toy boat / white, blue, wooden
    toy rabbit / pink, soft, fluffy
    toy dinosaur / green, purple, orange
    toy elephant / gray, soft, big
    toy robot / silver, shiny, square
    """
)

PLAY_PLACES = table(
    """
    place / search / spot
    park / behind the bench, near the gate, by the pond \
    / under the slide, in the tall grass, next to the fountain, behind a big tree
    playground / behind the bench, near the swings, by the fence \
    / under the slide, in the sandbox, inside the tunnel
    garden / behind the shed, near the roses, by the wall \
    / under a bush, between the carrots, behind a flower pot
    beach / behind the rocks, near the water, by the boats \
    / under a towel, next to a big shell, behind a sand castle
    farm / behind the barn, near the ducks, by the cows \
    / under an old cart, in a pile of hay, behind a basket of apples
    forest / behind the rocks, near the stream, by the path \
    / under a fern, on a pile of leaves, next to an old log
    """
)

LOST_TOY = Plot(
    (cast("Lily", "Tim", "Mom"), HOMES, FAIR_DAYS, TOYS, PLAY_PLACES),
    OPENING
    + script(
        """
        - {hero} had {a look} {toy} and took it everywhere.
        - {His} favorite toy was {a look} {toy}.
        - {hero} loved {his} {look} {toy} more than any other toy.

        - One {day}, {hero} took the {toy} to the {place}.
        - One {day}, {he} went to the {place} with {elder} and took the {toy} along.
        - One {day}, {elder} and {hero} went to the {place} with the {toy}.

        - {He} ran and jumped. Then {he} saw that the {toy} was gone.
        - But when it was time to go home, the {toy} was gone.
        - {hero} chased a butterfly. When {he} came back, the {toy} was gone.

        - "Oh no! Where is my {toy}?" cried {hero}.
        - "I lost my {toy}!" said {hero} and began to cry.
        - {hero} felt very sad. "I can not find my {toy}," {he} said.

        - "Do not worry," said {elder}. "We will look for it together."
        - {elder} gave {him} a hug. "Let us look for it."
        - {elder} took {his} hand and said, "I will help you."

        - They looked {search}, but it was not there.
        - First they looked {search}. There was no {toy}.

        - Then {hero} looked {spot}. There was the {toy}!
        - Then {elder} looked {spot} and smiled. The {toy} was there!
        - At last, {hero} saw something {look} {spot}. It was the {toy}!

        - {hero} hugged the {toy} and always kept it close after that.
        - {hero} was so happy that {he} danced. "Thank you, {elder}!" {he} said.
        - {hero} hugged the {toy}. {He} learned that it is good to ask for help.
        - {hero} laughed and gave {elder} a hug. It was a good day after all.
        """
    ),
)

STUCK_THINGS = table(
    """
    thing / look / play / rise
    kite / red, yellow, striped, purple / flew the kite over the grass / The wind pulled it up
    balloon / round, pink, silver, blue / ran along with the balloon / The string slipped away
    toy plane / white, silver, paper / threw the toy plane into the air / The wind turned it
    ball / green, orange, bouncy / kicked the ball very hard / It flew up and up
    """
)

TOOLS = table(
    """
    tool / fetch / use
    long stick / They found one / {hero} held it up and pushed
    ladder / Dad came with one / Dad climbed up and pulled
    broom / {friend} brought one / {hero} held it up and pushed
    net / {friend} brought one / {hero} reached up and pulled
    rope / {friend} brought one / {hero} threw it over the branch and pulled
    """
)

FIELDS = table(
    """
    day / field / tree
    windy day, windy morning, breezy afternoon / park, hill, meadow, field \
    / oak tree, apple tree, pine tree, tall tree, old tree, cherry tree
    """
)

STUCK_KITE = Plot(
    (cast("Ben", "Mia"), HOMES, STUCK_THINGS, TOOLS, FIELDS),
    OPENING
    + script(
        """
        - {hero} had {a look} {thing}.
        - For {his} birthday, {he} got {a look} {thing}.
        - {He} liked to play with {his} {look} {thing}.

        - One {day}, {he} went to the {field} with {his} friend {friend}.
        - One {day}, {he} and {his} friend {friend} took the {thing} to the {field}.

        - {hero} {play}. {rise}, and the {thing} got stuck in {a tree}.
        - {hero} {play}. {rise}. Then the {thing} was stuck in {a tree}!

        - "Oh no, my {thing}!" cried {hero}.
        - "It is too high," said {hero} with a sad face.
        - "How can I get it back?" asked {hero}.

        - They jumped high, but they could not reach it.
        - {friend} shook the {tree}, but the {thing} did not move.
        - {hero} tried to climb up, but it was too hard.

        - Then {friend} had an idea. "We need {a tool}," {friend_he} said.
        - "I know!" said {friend}. "We can use {a tool}."

        - {fetch}. {use}, and the {thing} came down.
        - {fetch}. {use}. Down came the {thing}!

        - "We did it!" {hero} and {friend} played until the sun went down.
        - "You are so clever!" said {hero} and let {friend} play too.
        - {hero} clapped {his} hands. "Thank you, {friend}!" {he} said.
        - {hero} learned that working together makes hard things easy.
        """
    ),
)

FOODS = table(
    """
    food / more
    cheese sandwiches, egg sandwiches, warm rolls, little pies \
    / grapes, cherries, red apples, sweet pears, strawberries, cookies
    """
)

SHELTERS = table(
    """
    spot / inside / floor
    by the lake, by the river / ran home / on the kitchen floor, on the rug
    in the meadow, in the park / ran home / on the kitchen floor, under the table
    near the farm / ran into the barn / on the dry hay
    on the beach / ran into the boat house / on the wooden floor
    in the garden, under the trees / ran back to the house / on the rug, next to the fire
    """
)

PICNIC = Plot(
    (cast("Anna", "Tom", "Grandma"), HOMES, FAIR_DAYS, FOODS, SHELTERS),
    OPENING
    + script(
        """
        - One {day}, {hero} and {his} friend {friend} had a picnic with {elder}.
        - One {day}, {he} and {elder} took {his} friend {friend} to a picnic.

        - They filled a basket with {food} and {more}.
        - {hero} packed {food}. {elder} packed some {more}.

        - They put a blanket down {spot}.
        - They found a place {spot} and sat down.

        - But soon the sky turned gray, and it began to rain.
        - Just then, a dark cloud came, and it began to rain.
        - Then there was a boom of thunder, and it began to rain.

        - "Our picnic is spoiled!" said {hero}.
        - "Oh no, not now!" cried {hero}.

        - "Quick, take the basket!" said {elder}. They {inside}.
        - They picked up the basket and {inside}.

        - Then {friend} had an idea. "We can have it right here!"
        - "We can still have a picnic," said {friend}.

        - So they sat {floor} and ate the {food} and the {more}.
        - They sat {floor} and ate the {food}. The {more} tasted best of all.

        - "This is the best picnic ever," said {hero}.
        - {hero} learned that a rainy day can be a happy day too.
        - Outside it rained, but {hero} and {friend} laughed and told jokes.
        """
    ),
)

PLAY = (LOST_TOY, STUCK_KITE, PICNIC)
