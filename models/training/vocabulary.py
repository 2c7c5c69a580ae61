"""The words that are one token each, in the order of their token ids.

They are what the task templates are made of (Ġ stands for the space before a word), most frequent
first. The list is fixed: a new domain may use other words, which are then spelled in letters, but
must not renumber these, or the trained models lose their tongue.
"""

from typing import Final

_WORDS: Final = """
What Ġis Ġin Ġthe Ġ' Ġmany Ġ+ Ġare Ġdoes Ġand Ġof Ġminutes Ġafter ĠHow ĠPython Ġdays How Ġtime Ġto
Ġ- Ġ= Ġword Which Ġhas Ġ* Ġcomes Ġletters Evaluate Ġletter Ġhave Write Ġ" Ġwhat Ġ[ Ġhours Ġy
Convert Ġmonths Ġbefore Ġprint Ġlen Ġit Ġleft Ġnumber Ġmore Ġshow Ġexpression Ġgive Ġreturn
Ġbackwards Ġlast Ġvalue Ġmonth Ġon Ġday Ġfirst Calculate Ġx Ġdate Reverse In Ġorder Ġfrom Ġcm
Ġsmallest Sort Ġbuys Ġinto Ġpages Ġtwo Ġlist Ġbooks Ġcoins Ġapples Ġpens Ġdollars Ġbox Change
Ġcards Ġwith Ġnow Ġeggs Ġballs Ġlargest Ġstamps Ġnumbers Ġa Ġsecond Spell Ġ? Put Ġmax Ġweekday
Ġbus Ġpeople Ġbirds Ġmuch Ġaway Ġsum Ġgives Ġall Ġweek ĠMonday Ġmin ĠTuesday Ġstr There Ġmm Ġg Ġkg
Ġliters Ġml Ġkm Ġm Ġcents Ġ/ Ġmeters Ġdo Count Ġyears Give Ġspelled Ġget Ġreverse Ġby Add Ġseconds
Ġfeet Ġinches ĠMax ĠTom Ġtimes Ġhyphens Ġpm Ġweeks ĠAnna Ġbetween Ġhyphen ĠLucy ĠBen Ġam ĠEmma Ġ<
ĠSam ĠMia Ġcarries Ġthey Ġtogether Max Ġhad Ġshop Ġsold Ġflew Ġtree Ġwere Ġone Ġanother Ġthere
ĠWednesday Ġthan Ġascending Ġplus Ġread Ġthat ĠSaturday Ben Ġdescending Lucy Ġminus Ġloses Mia Sam
ĠFriday Ġcase Ġupper Ġcapital Anna Ġlong Ġcapitals Ġ% Tom Ġthird Emma Take After Subtract If
ĠSunday Ġbiggest Ġ> Uppercase Ġshortest Ġsorted ĠThursday ĠOctober ĠAugust Ġboxes Ġholds ĠFebruary
ĠNovember Ġlongest ĠMay Ġproduct ĠDecember Ġfourth ĠJanuary ĠMarch ĠJuly Ġpacks ĠJune Each
ĠSeptember ĠApril Multiply Ġabs Ġfinds Ġ( Ġint Ġcost Ġcosts Ġticket Ġtickets Ġfifth Ġdivided
Divide Ġamong Ġeach Ġequally Ġfriend Ġfriends Ġshares Ġsixth You Ġassistant Ġhelpful Answer
ĠAnswer Ġbriefly Ġonly Ġresult ĠRoman Ġnumeral Ġwords Ġdigits Ġas Ġan ĠISO Ġhundred Please Hello
Ġplease
"""


def words() -> list[str]:
    """The words, each with a space or a capital letter at its start."""
    return _WORDS.split()
