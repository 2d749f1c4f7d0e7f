package main

import (
	"reflect"
	"runtime"
	"strings"
	"testing"
)

// TestWhatHoldsInMemoryHoldsInRedis has tests of a ticket's life, of theft, replay
// and confirmation run once more, on a real Redis.
func TestWhatHoldsInMemoryHoldsInRedis(t *testing.T) {
	t.Setenv("WXSCAN_REDIS", "redis://127.0.0.1:"+startRedis(t).port)
	for _, test := range []func(*testing.T){
		TestTicketExpiresToTheNanosecond, TestResultStaysReadableThenGoes, TestAScanLeavesTimeToDecide,
		TestTicketBelongsToItsFlow, TestTicketIsIssuedOnce, TestAllWaitersWakeAtOnce, TestWaitEnds, TestNoWakeUpIsLost,
		TestFirstScanWinsARace, TestOneDecisionUnderAnyRace, TestACodeIsClaimedOnce, TestInvalidCodesDoNotUseUpATicket,
		TestACodeOfATicketThatExpiresMeanwhileIsNoLogin, TestACodeWhoseReplicaDiedIsClaimedAgain,
		TestLogin, TestCallback, TestPollWakesAtTheScan, TestMadeUpCodesDenyNobodyTheLogin,
		TestAPhotographOfTheCodeTakesNoLogin, TestOneSignatureCarriesOneBody, TestAPushIsMatchedByItsScene,
		TestPassiveReplyGoesToTheFirstWhoHasScanned,
		TestNobodyIsLoggedInBeforeThePhoneConfirms, TestASecondScanChangesNoClaim, TestThePhoneMayComeBackWhileItIsAsked,
		TestACallbackOpenedAgainTellsWhatWasDecided, TestClaimExpiresWithItsTicket, TestPollHearsOfEachStep,
		TestWhatThePageDoesNotAskForIsNoAnswer, TestAnswersWithinASecondDecideNothing,
	} {
		name := runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()
		t.Run(strings.TrimPrefix(name, "wxscan.Test"), test)
	}
}
