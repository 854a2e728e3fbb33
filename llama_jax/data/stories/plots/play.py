"""Stories of play and small bad luck: a lost toy, a kite in a tree, rain on a picnic."""

from llama_jax.data.stories.grammar import Plot, script, table
from llama_jax.data.stories.words import FAIR_DAYS, HOMES, OPENING, cast

TOYS = table(
    """
    toy / look
    ball / red, blue, bouncy
    teddy / soft, brown, fluffy
    doll / small, pretty, soft
    truck / red, yellow, shiny
    train / green, shiny, wooden
    boat / white, blue, wooden
    bunny / pink, soft, fluffy
    dragon / green, purple, orange
    robot / silver, shiny, square
    """
)

PLAY_PLACES = table(
    """
    place / spot
    park, playground, garden, meadow, farm, zoo \
    / under a bush, behind a tree, in the tall grass, next to a big stone, on a pile of leaves
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

        - They looked here and there, but there was no {toy}.
        - First they looked in the bag, but there was no {toy}.

        - Then {hero} looked {spot}. There was the {toy}!
        - Then {elder} looked {spot} and smiled. The {toy} was there!
        - At last, {hero} saw something {spot}. It was the {toy}!

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
    plane / white, silver, paper / threw the plane into the air / The wind turned it
    ball / green, orange, bouncy / kicked the ball very hard / It flew up and up
    """
)

TOOLS = table(
    """
    tool / use
    stick, ladder, broom, net, rope / reached up and pulled, reached up high and pushed
    """
)

FIELDS = table(
    """
    day / field / kind
    windy day, windy morning, windy afternoon / park, hill, meadow, field \
    / oak, apple, pine, cherry
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

        - {hero} {play}. {rise}, and the {thing} got stuck in {a kind} tree.
        - {hero} {play}. {rise}. Then the {thing} was stuck in {a kind} tree!

        - "Oh no, my {thing}!" cried {hero}.
        - "It is too high," said {hero} with a sad face.
        - "How can I get it back?" asked {hero}.

        - They jumped high, but they could not reach it.
        - {friend} shook the tree, but the {thing} did not move.
        - They tried to climb up, but it was too hard.

        - Then {friend} had an idea. "We need {a tool}," {friend_he} said.
        - "I know!" said {friend}. "We can use {a tool}."

        - {friend} ran home and brought it. {hero} {use}, and the {thing} came down.
        - They went to get it. {hero} {use}. Down came the {thing}!

        - "We did it!" {hero} and {friend} played until the sun went down.
        - "You are so clever!" said {hero} and let {friend} play too.
        - {hero} clapped {his} hands. "Thank you, {friend}!" {he} said.
        - {hero} learned that working together makes hard things easy.
        """
    ),
)

FOODS = table(
    """
    food
    sandwiches, rolls, pancakes, muffins, cherries, apples
    """
)

PICNIC_PLACES = table(
    """
    spot / floor
    by the lake, by the river, in the meadow, in the park, in the garden, under the trees \
    / on the kitchen floor, on the rug, under the table, next to the fire
    """
)

PICNIC = Plot(
    (cast("Anna", "Tom", "Grandma"), HOMES, FAIR_DAYS, FOODS, PICNIC_PLACES),
    OPENING
    + script(
        """
        - One {day}, {hero} and {his} friend {friend} had a picnic with {elder}.
        - One {day}, {he} and {elder} took {his} friend {friend} to a picnic.

        - They filled a big basket with {food}.
        - {hero} packed {food} in a basket and took a warm blanket.

        - They put the basket of {food} down {spot}.
        - They sat down {spot} and looked at the {food}.

        - But soon the sky turned gray, and it began to rain.
        - Just then, a dark cloud came, and it began to rain.
        - Then there was a boom of thunder, and it began to rain.

        - "Our {food} will get wet!" said {hero}.
        - "Oh no, our nice {food}!" cried {hero}.

        - "Quick, take the basket!" said {elder}. They ran home.
        - They picked up the basket and ran home.

        - Then {friend} had an idea. "We can have it right here!"
        - "We can still have a picnic," said {friend}.

        - So they sat {floor} and ate all the {food}.
        - They sat {floor} and ate. The {food} tasted so good!

        - "This is the best picnic ever," said {hero}.
        - {hero} learned that a rainy day can be a happy day too.
        - Outside it rained, but {hero} and {friend} laughed and told jokes.
        """
    ),
)

PLAY = (LOST_TOY, STUCK_KITE, PICNIC)
